//! `out = x W^T + b` for weights as checkpoints hold them.
//!
//! `x` is `[tokens, in]`, each part of `w` is `[out_i, in]`, `out` is `[tokens, sum of out_i]`:
//! merged projections are parts side by side, never copied together. Few tokens stream the weights
//! once, row by row, at memory speed; many tokens go through packed panels at arithmetic speed.
//! A token's result depends on the variant chosen by the number of tokens, within f32 rounding,
//! and on nothing else of the batch.

pub mod cuda;

#[cfg(target_arch = "x86_64")]
mod gemm_avx512;
#[cfg(target_arch = "x86_64")]
mod gemv_avx512;
#[cfg(test)]
mod reference;
mod rows;
#[cfg(test)]
mod tests;

#[cfg(target_arch = "x86_64")]
pub(crate) use gemv_avx512::{Load, lanes};

use crate::Matrix;
use crate::share::{PerThread, Shared};
use device::{Isa, ThreadPool};

/// Outputs that one item of the parallel loop computes; a multiple of every kernel's tile.
pub(crate) const ROWS_PER_ITEM: usize = 64;

/// Up to this many tokens the weights' bytes cost more than the arithmetic.
const GEMV_MAX_TOKENS: usize = 12;

/// How a product is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// Weights streamed once through registers, AVX-512.
    GemvAvx512,
    /// Packed panels, AVX-512.
    GemmAvx512,
    /// A dot product per output and token, any processor.
    Rows,
}

impl Variant {
    /// The name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::GemvAvx512 => "gemv_avx512",
            Self::GemmAvx512 => "gemm_avx512",
            Self::Rows => "rows",
        }
    }
}

/// The variant for a number of tokens on a processor.
#[must_use]
pub fn select(isa: Isa, tokens: usize) -> Variant {
    match isa {
        Isa::Avx512 if tokens <= GEMV_MAX_TOKENS => Variant::GemvAvx512,
        Isa::Avx512 => Variant::GemmAvx512,
        Isa::Avx2 | Isa::Scalar => Variant::Rows,
    }
}

/// Elements of scratch that [`linear`] needs for inputs of `cols`: one packed panel per thread.
#[must_use]
pub fn scratch_len(pool: &ThreadPool, cols: usize) -> usize {
    PANEL * cols * pool.threads()
}

/// Outputs of one packed panel.
pub(crate) const PANEL: usize = 32;

/// Computes the product on the best variant of this processor.
///
/// # Panics
/// When a length does not fit the shapes; those are the model compiler's promise.
pub fn linear(
    pool: &ThreadPool,
    x: &[f32],
    tokens: usize,
    w: &[Matrix<'_>],
    biases: &[&[f32]],
    out: &mut [f32],
    scratch: &mut [f32],
) {
    linear_on(Isa::detect(), pool, x, tokens, w, biases, out, scratch);
}

/// As [`linear`], on a given instruction set; for tests and measurements.
///
/// # Panics
/// As [`linear`].
#[allow(clippy::too_many_arguments, reason = "the operands of a product")]
pub fn linear_on(
    isa: Isa,
    pool: &ThreadPool,
    x: &[f32],
    tokens: usize,
    w: &[Matrix<'_>],
    biases: &[&[f32]],
    out: &mut [f32],
    scratch: &mut [f32],
) {
    let cols = w.first().map_or(0, |part| part.cols);
    let width: usize = w.iter().map(|part| part.rows).sum();
    assert!(w.iter().all(|part| part.cols == cols), "parts of one product share their inputs");
    assert_eq!(x.len(), tokens * cols, "x is [{tokens}, {cols}]");
    assert_eq!(out.len(), tokens * width, "out is [{tokens}, {width}]");
    let one_each = biases.len() == w.len() && biases.iter().zip(w).all(|(b, w)| b.len() == w.rows);
    assert!(biases.is_empty() || one_each, "one bias per part, or none");
    if tokens == 0 || width == 0 {
        return;
    }
    let variant = select(isa, tokens);
    if variant == Variant::GemmAvx512 {
        assert!(scratch.len() >= scratch_len(pool, cols), "scratch for one panel per thread");
    }
    let out = Shared::new(out);
    let panels = PerThread::new(scratch, PANEL * cols);
    let mut offset = 0;
    for (index, part) in w.iter().enumerate() {
        let bias = biases.get(index).copied();
        let items = part.rows.div_ceil(ROWS_PER_ITEM);
        pool.run(items, &|item| {
            let rows = item * ROWS_PER_ITEM..((item + 1) * ROWS_PER_ITEM).min(part.rows);
            let tile = Tile {
                x,
                tokens,
                w: part.rows(rows.clone()),
                bias: bias.map(|bias| &bias[rows.clone()]),
                at: offset + rows.start,
                width,
            };
            tile.run(isa, variant, &out, &panels);
        });
        offset += part.rows;
    }
}

/// Some outputs of one matrix for all tokens: what one item of a parallel loop computes. Writes
/// `w.rows` elements from `at + token * width` on for each token, and nothing else.
pub(crate) struct Tile<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) tokens: usize,
    pub(crate) w: Matrix<'a>,
    /// Of this tile's outputs.
    pub(crate) bias: Option<&'a [f32]>,
    /// Element of the output where the first token's first output goes.
    pub(crate) at: usize,
    /// Elements of a row of the output.
    pub(crate) width: usize,
}

impl Tile<'_> {
    /// Computes the tile.
    pub(crate) fn run(
        &self,
        isa: Isa,
        variant: Variant,
        out: &Shared<'_, f32>,
        panels: &PerThread<'_>,
    ) {
        match variant {
            Variant::Rows => rows::run(isa, self, out),
            #[cfg(target_arch = "x86_64")]
            Variant::GemvAvx512 => gemv_avx512::run(self, out),
            #[cfg(target_arch = "x86_64")]
            Variant::GemmAvx512 => panels.with(|panel| gemm_avx512::run(self, out, panel)),
            #[cfg(not(target_arch = "x86_64"))]
            Variant::GemvAvx512 | Variant::GemmAvx512 => {
                let _ = panels;
                rows::run(isa, self, out);
            }
        }
    }

    fn bias(&self, row: usize) -> f32 {
        self.bias.map_or(0.0, |bias| bias[row])
    }
}
