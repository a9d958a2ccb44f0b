//! A dot product per output and token: any processor, any shape.

use super::Tile;
use crate::WeightSlice;
use crate::share::Shared;
use crate::simd::dot;
use device::Isa;

pub(super) fn run(isa: Isa, tile: &Tile<'_>, out: &Shared<'_, f32>) {
    let cols = tile.w.cols;
    for row in 0..tile.w.rows {
        let w = tile.w.row(row);
        for token in 0..tile.tokens {
            let x = &tile.x[token * cols..(token + 1) * cols];
            let sum = match w {
                WeightSlice::F32(w) => dot(isa, x, w),
                WeightSlice::Bf16(w) => dot(isa, x, w),
                WeightSlice::F16(w) => dot(isa, x, w),
            };
            // SAFETY: items write disjoint columns, and each (token, row) is visited once.
            let cell = unsafe { out.part(tile.at + token * tile.width + row, 1) };
            cell[0] = sum + tile.bias(row);
        }
    }
}
