//! Products whose time is the reading of weights: kernels that keep a ring of shared memory full of
//! them, for nine rows and more.
//!
//! The steps of all tiles are dealt out evenly to as many blocks as there are multiprocessors; sums of
//! a tile that blocks share meet in [`Shared`]. Which blocks those are depends on the shape alone, so a
//! row has the same bits whatever the others hold. Tensor maps are made on the host with every launch,
//! which asks the device for nothing. A launch begins before the one in front has ended, and reads
//! weights and the number of real rows before waiting for it: no kernel right in front may write those.
//! Invariant: shapes here are those of the kernels in `linear_wide.cu` and `moe_wide.cu`.

#[cfg(test)]
mod tests;

use super::{Linear, Then, WIDE};
use crate::cuda::{Dtype, Queue, Rows, apart, bytes, dim, shape};
use device::cuda::{
    Context, CudaError, DeviceMemory, DeviceSlice, Launch, Parameters, Stream, Swizzle, TensorMap,
};

/// Elements of a line of 128 bytes, along the inputs.
pub(crate) const LINE: usize = 64;
/// Shared memory of a multiprocessor that its blocks share, and what a block keeps from its stages.
const MEMORY: usize = 227 * 1024;
const RESERVED: usize = 1024;
/// Most stages.
const MOST_STAGES: usize = 24;
/// Blocks that share a tile: the sum of more parts takes longer than their reading.
const MOST_PARTS: usize = 8;
/// Barriers of a stage, in bytes.
const BARRIERS: usize = 16;

/// Mirrors `wide::Shape`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Warpgroups that compute.
    pub(crate) groups: usize,
    /// Times 64 outputs of a warpgroup.
    pub(crate) slabs: usize,
    /// Rows of a tile.
    pub(crate) rows: usize,
    /// Rows of a box.
    pub(crate) row_box: usize,
    /// Boxes along the inputs of a stage.
    pub(crate) boxes: usize,
    /// Blocks that fit a multiprocessor.
    pub(crate) share: usize,
}

impl Shape {
    /// Outputs of a tile.
    pub(crate) const fn outputs(self) -> usize {
        64 * self.groups * self.slabs
    }

    /// Threads of a block: the warpgroups and the producer's warp.
    pub(crate) const fn threads(self) -> u32 {
        (128 * self.groups + 32) as u32
    }

    /// Shared memory of a block, in bytes.
    pub(crate) const fn shared(self) -> u32 {
        let stage = self.boxes * (self.outputs() + self.rows) * 2 * LINE;
        let fit = (MEMORY / self.share - RESERVED) / stage;
        let stages = if fit < MOST_STAGES { fit } else { MOST_STAGES };
        (stages * (stage + BARRIERS)) as u32
    }

    /// Rows of `x`: `[rows, inputs]`, `stride` elements apart.
    pub(crate) fn x_map(
        self,
        x: &DeviceSlice,
        rows: usize,
        inputs: usize,
        stride: usize,
    ) -> Result<TensorMap, CudaError> {
        let boxes = [LINE as u32, self.row_box as u32];
        let dims = [inputs as u64, rows as u64];
        TensorMap::bf16_strided(x, dims, [1, stride as u64], boxes, Swizzle::Bytes128)
    }

    /// Weights `[batch, outputs, inputs]`.
    pub(crate) fn w_map(
        self,
        w: &DeviceSlice,
        batch: usize,
        outputs: usize,
        inputs: usize,
    ) -> Result<TensorMap, CudaError> {
        let boxes = [LINE as u32, self.outputs() as u32, 1];
        let dims = [inputs as u64, outputs as u64, batch as u64];
        TensorMap::bf16(w, dims, boxes, Swizzle::Bytes128)
    }

    /// Weights `[batch, 2, outputs, inputs]`, eight outputs of the first half, the same of the second,
    /// and so on; `outputs` is a multiple of 8.
    pub(crate) fn pairs_map(
        self,
        w: &DeviceSlice,
        batch: usize,
        outputs: usize,
        inputs: usize,
    ) -> Result<TensorMap, CudaError> {
        let boxes = [LINE as u32, 8, 2, (self.outputs() / 16) as u32, 1];
        let [n, k] = [outputs as u64, inputs as u64];
        let dims = [k, 8, 2, n / 8, batch as u64];
        let strides = [1, k, n * k, 8 * k, 2 * n * k];
        TensorMap::bf16_strided(w, dims, strides, boxes, Swizzle::Bytes128)
    }
}

/// Where sums of a tile meet. Launches that use it run one after the other.
#[derive(Debug)]
pub(crate) struct Shared {
    /// A tile of f32 for every block.
    partial: DeviceSlice,
    /// A u32 for every warpgroup of every block; zero between launches.
    flags: DeviceSlice,
}

impl Shared {
    /// Of sums, and of flags.
    fn parts(blocks: usize) -> [usize; 2] {
        const MOST_GROUPS: usize = 2;
        let most = ALL.iter().map(|tile| 4 * tile.outputs * tile.rows).max().unwrap_or(0);
        [blocks * most, blocks * MOST_GROUPS * 4]
    }

    /// Bytes in all.
    pub(crate) fn bytes(multiprocessors: usize) -> usize {
        Self::parts(multiprocessors).into_iter().sum()
    }

    /// Memory for launches of as many blocks as there are multiprocessors.
    pub(crate) fn new(context: &Context) -> Result<Self, CudaError> {
        let [sums, flags] = Self::parts(context.facts().multiprocessors as usize);
        let partial = DeviceMemory::allocate(context, "sums of split products", sums)?;
        let flags = DeviceMemory::allocate(context, "their flags", flags)?;
        let stream = Stream::new(context)?;
        stream.fill(&flags, 0)?;
        stream.synchronize()?;
        Ok(Self { partial, flags })
    }
}

/// Outputs and rows of a tile of the kernels in `linear_wide.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// 64 or 128.
    pub outputs: usize,
    /// 16 to 256.
    pub rows: usize,
}

const fn tile(outputs: usize, rows: usize) -> Tile {
    Tile { outputs, rows }
}

/// Every tile there is.
pub(crate) const ALL: [Tile; 12] = [
    tile(64, 16),
    tile(64, 32),
    tile(64, 64),
    tile(64, 96),
    tile(64, 128),
    tile(128, 16),
    tile(128, 32),
    tile(128, 64),
    tile(128, 96),
    tile(128, 128),
    tile(128, 192),
    tile(128, 256),
];

/// Kernels that have more shared memory than the default.
pub(crate) fn large() -> impl Iterator<Item = &'static str> {
    let names = |tile: Tile| [tile.kernel(Dtype::F32), tile.kernel(Dtype::Bf16), tile.gate()];
    ALL.into_iter().flat_map(names).flatten()
}

/// Rows up to which a product and the activation of its results are faster in one launch than the library's
/// product and another launch.
const GATE_ROWS: usize = 64;

/// The tile of a product whose results are activated, if kernels take it so.
pub(super) fn gates(rows: usize, operands: &Linear<'_>) -> Option<Tile> {
    let Linear { x, out, inputs, outputs, bias, norm, .. } = *operands;
    let plain = takes(operands) && out.dtype == Dtype::Bf16 && bias.is_none() && norm.is_none();
    // The first blocks store while others read.
    let plain = plain && apart(x.slice, out.slice);
    let tile = Tile::select(rows, outputs.checked_mul(2)?, inputs);
    (plain && rows <= GATE_ROWS && tile.gate().is_some()).then_some(tile)
}

impl Tile {
    /// For products of more than a handful of rows. Small products take small tiles, of which more
    /// blocks have a part; large ones read larger boxes, and weights less often where rows are many.
    pub(crate) fn select(rows: usize, outputs: usize, inputs: usize) -> Self {
        /// Elements of weights up to which small tiles were measured to be faster.
        const FOR_64: usize = 32 << 20;
        const FOR_128: usize = 12 << 20;
        const FOR_256: usize = 8 << 20;
        /// Up to which more rows are split.
        const SPLIT: usize = 32 << 20;
        let weights = outputs.saturating_mul(inputs);
        let by = |most: usize| if weights <= most { 64 } else { 128 };
        match rows {
            0..=16 => tile(by(FOR_64), 16),
            17..=32 => tile(by(FOR_64), 32),
            33..=64 => tile(by(FOR_64), 64),
            65..=96 => tile(by(FOR_128), 96),
            97..=128 if weights <= FOR_256 => tile(64, 64),
            97..=128 => tile(by(FOR_128), 128),
            129..=192 if weights <= FOR_128 => tile(64, 96),
            129..=192 => tile(128, 192),
            193..=256 if weights <= SPLIT => tile(by(FOR_256), 128),
            257..=512 if weights <= SPLIT => tile(128, 128),
            _ => tile(128, 256),
        }
    }

    pub(crate) const fn kernel(self, out: Dtype) -> Option<&'static str> {
        Some(match (self.outputs, self.rows) {
            (64, 16) => out.pick("linear_wide_64x16_f32", "linear_wide_64x16_bf16"),
            (64, 32) => out.pick("linear_wide_64x32_f32", "linear_wide_64x32_bf16"),
            (64, 64) => out.pick("linear_wide_64x64_f32", "linear_wide_64x64_bf16"),
            (64, 96) => out.pick("linear_wide_64x96_f32", "linear_wide_64x96_bf16"),
            (64, 128) => out.pick("linear_wide_64x128_f32", "linear_wide_64x128_bf16"),
            (128, 16) => out.pick("linear_wide_128x16_f32", "linear_wide_128x16_bf16"),
            (128, 32) => out.pick("linear_wide_128x32_f32", "linear_wide_128x32_bf16"),
            (128, 64) => out.pick("linear_wide_128x64_f32", "linear_wide_128x64_bf16"),
            (128, 96) => out.pick("linear_wide_128x96_f32", "linear_wide_128x96_bf16"),
            (128, 128) => out.pick("linear_wide_128x128_f32", "linear_wide_128x128_bf16"),
            (128, 192) => out.pick("linear_wide_128x192_f32", "linear_wide_128x192_bf16"),
            (128, 256) => out.pick("linear_wide_128x256_f32", "linear_wide_128x256_bf16"),
            _ => return None,
        })
    }

    /// The kernel whose results are activated, for as many rows as [`gates`] takes.
    const fn gate(self) -> Option<&'static str> {
        Some(match (self.outputs, self.rows) {
            (64, 16) => "linear_wide_64x16_gate",
            (64, 32) => "linear_wide_64x32_gate",
            (64, 64) => "linear_wide_64x64_gate",
            (128, 16) => "linear_wide_128x16_gate",
            (128, 32) => "linear_wide_128x32_gate",
            (128, 64) => "linear_wide_128x64_gate",
            _ => return None,
        })
    }

    const fn shape(self) -> Shape {
        let Self { outputs, rows } = self;
        Shape {
            groups: outputs / 64,
            slabs: 1,
            rows,
            row_box: rows,
            boxes: if outputs == 128 && rows <= 64 { 2 } else { 1 },
            share: if outputs == 64 { 2 } else { 1 },
        }
    }
}

/// Whether the kernels take the operands: one product of bf16 with whole 16-byte units everywhere.
pub(crate) fn takes(operands: &Linear<'_>) -> bool {
    let Linear { out, out_stride, outputs, batch, .. } = *operands;
    operands.is_aligned()
        && batch == 1
        && out_stride.is_multiple_of(WIDE)
        && outputs.is_multiple_of(WIDE)
        && out.address().is_multiple_of(16)
}

/// The product; lengths are checked by the caller.
pub(super) fn launch(
    tile: Tile,
    on: Queue<'_>,
    rows: Rows<'_>,
    operands: &Linear<'_>,
) -> Result<(), CudaError> {
    const OP: &str = "linear";
    let Linear { x, x_stride, w, bias, out, out_stride, inputs, outputs, .. } = *operands;
    let refused = || shape(OP, format!("{operands:?} as {tile:?}"));
    let gate = operands.then == Then::Gate;
    let name = match operands.then {
        Then::Store => tile.kernel(out.dtype),
        Then::Gate if gates(rows.padded, operands).is_some() => tile.gate(),
        Then::Gate | Then::Add => None,
    };
    let name = name.filter(|_| takes(operands)).ok_or_else(refused)?;
    let shared = on.shared();
    let shape_of = tile.shape();
    let (w, lines_of) = if gate {
        (shape_of.pairs_map(w, 1, outputs, inputs)?, bytes(OP, &[2, outputs])?)
    } else {
        (shape_of.w_map(w, 1, outputs, inputs)?, outputs)
    };
    let params = Params {
        w,
        x: shape_of.x_map(x.slice, rows.padded, inputs, x_stride)?,
        bias: bias.map_or(0, DeviceSlice::address),
        out: out.address(),
        partial: shared.partial.address(),
        flags: shared.flags.address(),
        count: rows.count_address(),
        tiles: 0,
        out_stride: out_stride as u64,
        rows: dim(OP, rows.padded)?,
        outputs: dim(OP, lines_of)?,
        inputs: dim(OP, inputs)?,
    };
    let tiles = [lines_of.div_ceil(tile.outputs), rows.padded.div_ceil(tile.rows)];
    let steps = bytes(OP, &[tiles[0], tiles[1], inputs.div_ceil(LINE * shape_of.boxes)])?;
    let blocks = steps.min(on.multiprocessors()).min(tiles[0] * tiles[1] * MOST_PARTS);
    // The kernel multiplies steps by blocks.
    dim(OP, bytes(OP, &[steps, blocks + 1])?)?;
    Launch::new(on.kernel(name)?, [dim(OP, blocks)?, 1, 1], shape_of.threads())
        .shared(shape_of.shared())
        .dependent()
        .on(on.stream, &params)
}

/// Mirrors `wide::Params`.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(crate) struct Params {
    pub(crate) w: TensorMap,
    pub(crate) x: TensorMap,
    pub(crate) bias: u64,
    pub(crate) out: u64,
    pub(crate) partial: u64,
    pub(crate) flags: u64,
    pub(crate) count: u64,
    pub(crate) tiles: u64,
    pub(crate) out_stride: u64,
    pub(crate) rows: u32,
    pub(crate) outputs: u32,
    pub(crate) inputs: u32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked where it is filled in.
unsafe impl Parameters for Params {}
