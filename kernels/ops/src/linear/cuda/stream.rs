//! Products of up to eight rows, whose time is the reading of weights: rows of them go through a ring in
//! shared memory, asked for by warps that do nothing else. A product may norm its rows first.
//!
//! Products leave half of a multiprocessor's memory to the kernel that follows, which fills its ring
//! meanwhile, where half is enough for them: small ones at once, larger ones when they have asked for nearly
//! all of their weights. A launch begins before the one in front has ended, and reads weights before waiting
//! for it: no kernel right in front may write those. Invariant: rings fit what kernels assume in
//! `stream.cuh`.

#[cfg(test)]
mod tests;

use super::{Linear, Normed, Then};
use crate::cuda::{Dtype, Queue, Rows, apart, bytes, dim, shape};
use device::cuda::{CudaError, DeviceSlice, Launch, Parameters};

/// Most rows.
pub(crate) const MOST_ROWS: usize = 8;
/// Kernels that have more shared memory than the default.
pub(crate) const LARGE: &[&str] =
    &["linear_stream", "linear_stream_staged", crate::moe::cuda::stream::KERNEL];
/// Threads of a block.
const THREADS: u32 = 384;
/// Bytes of `stream::Shared`.
const SHARED: usize = 4608;
/// Shared memory of a block that has a multiprocessor to itself, and of one that does not.
pub(crate) const WHOLE: usize = 226 * 1024;
const HALF: usize = 113 * 1024;
/// Bytes of weights up to which a product leaves half of it at once, and late: beyond, longer copies gain
/// more than the border costs; among unlike products that was so for one of 50 MB, and not for one of 34.
const SMALL: usize = 24 << 20;
const MIDDLE: usize = 34 << 20;
/// Stages, and columns of one, at most.
pub(crate) const MOST_STAGES: usize = 16;
pub(crate) const MOST_COLUMNS: usize = 2048;
/// Fewest stages with which reading goes on while one is multiplied.
pub(crate) const LEAST_STAGES: usize = 2;
/// Columns of a stage, at most, and fewest stages, of a product that leaves half of the memory late, of rows
/// that are not longer: parts of long ones are read slowly. Stages that it has not asked for then.
const LATE_COLUMNS: usize = 1024;
const LATE_STAGES: usize = 4;
const LATE_LONGEST: usize = 8192;
const LATE_LEFT: u32 = 5;
/// Bytes of rows of tokens beyond which they come with every stage.
const MOST_STAYING: usize = 130_000;
/// Columns that a warp takes at once, and those that all of them take.
const UNIT: usize = 32;
const ROUND: usize = 8 * UNIT;
/// Rows of weights of a stage.
pub(crate) const TILE: usize = 8;

/// Mirrors `stream::Ring`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ring {
    stages: u32,
    pitch: u32,
    stage_bytes: u32,
    step: u32,
    x_pitch: u32,
    left: u32,
}

/// When a product leaves half of the memory to another block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Half {
    AtOnce,
    Late,
    Never,
}

impl Half {
    const fn of(weights: usize) -> Self {
        if weights <= SMALL {
            Self::AtOnce
        } else if weights <= MIDDLE {
            Self::Late
        } else {
            Self::Never
        }
    }
}

/// What lies in shared memory beside the stages of a ring.
#[derive(Clone, Copy, Debug)]
struct Beside {
    /// Bytes of the kernel's own.
    own: usize,
    /// Elements of a token, where tokens stay; they come with every stage otherwise.
    staying: Option<usize>,
    /// Whether another block may have the other half.
    half: Half,
}

/// The least number of bytes, an odd multiple of 64, that holds so many.
pub(crate) const fn odd(bytes: usize) -> usize {
    (bytes + 63) / 128 * 128 + 64
}

impl Ring {
    /// For `tokens` rows and weights of up to `columns` columns; the ring, and bytes of shared memory.
    fn fit(columns: usize, tokens: usize, beside: Beside) -> Option<(Self, u32)> {
        let within =
            |memory, most, least| Self::within(memory, most, least, columns, tokens, beside);
        let half = match beside.half {
            Half::AtOnce => within(HALF, MOST_COLUMNS, LEAST_STAGES + 1),
            // Rows of tokens that come with every stage are waited for in front of all of it.
            Half::Late if beside.staying.is_some() && columns <= LATE_LONGEST => {
                let ring = within(HALF, LATE_COLUMNS, LATE_STAGES);
                ring.map(|(ring, shared)| (Self { left: LATE_LEFT, ..ring }, shared))
            }
            Half::Late | Half::Never => None,
        };
        half.or_else(|| within(WHOLE, MOST_COLUMNS, LEAST_STAGES))
    }

    /// In so much memory, with stages of at most so many columns, if there are `least` at least.
    fn within(
        memory: usize,
        most: usize,
        least: usize,
        columns: usize,
        tokens: usize,
        beside: Beside,
    ) -> Option<(Self, u32)> {
        let parts = columns.div_ceil(most).max(1);
        // However a row is cut, a warp has the same columns of it, and sums have the same bits.
        let step = columns.div_ceil(parts).next_multiple_of(if parts > 1 { ROUND } else { UNIT });
        let pitch = odd(2 * step);
        let x_pitch = beside.staying.map_or(0, |elements| odd(2 * elements));
        let coming = if beside.staying.is_some() { 0 } else { tokens };
        let stage_bytes = (pitch * (TILE + coming)).next_multiple_of(128);
        let fixed = beside.own + (tokens * x_pitch).next_multiple_of(128);
        let stages = (memory.saturating_sub(fixed) / stage_bytes).min(MOST_STAGES);
        let narrow = |n: usize| u32::try_from(n).ok();
        let ring = Self {
            stages: narrow(stages)?,
            pitch: narrow(pitch)?,
            stage_bytes: narrow(stage_bytes)?,
            step: narrow(step)?,
            x_pitch: narrow(x_pitch)?,
            left: 0,
        };
        (stages >= least).then_some((ring, narrow(fixed + stages * stage_bytes)?))
    }
}

/// Mirrors `StreamParams`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    x: u64,
    w: u64,
    bias: u64,
    out: u64,
    count: u64,
    x_stride: u64,
    out_stride: u64,
    tokens: u32,
    columns: u32,
    outputs: u32,
    pairs: u32,
    add: u32,
    out_f32: u32,
    ring: Ring,
    eps: f32,
    norm: u64,
    normed: u64,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `linear_as`.
unsafe impl Parameters for Params {}

/// Whether so many rows come with every stage, as they do not stay in shared memory.
const fn staged(rows: usize, inputs: usize) -> bool {
    rows * odd(2 * inputs) > MOST_STAYING
}

/// Whether rows that stay in shared memory can be normed there: every block reads them as they were, and one
/// stores them when it likes, so that nothing else may be written in either place.
fn norms(rows: usize, operands: &Linear<'_>) -> bool {
    let Linear { x, out, inputs, norm, .. } = *operands;
    norm.is_none_or(|Normed { weight, out: normed, .. }| {
        !staged(rows, inputs)
            && [weight, normed].iter().all(|slice| slice.address().is_multiple_of(16))
            && [out.slice, normed].iter().all(|slice| apart(x.slice, slice))
            && apart(out.slice, normed)
    })
}

/// Whether the kernels take the operands: one product of bf16 with whole 16-byte units along the
/// inputs, of few rows.
#[must_use]
pub fn takes(rows: usize, operands: &Linear<'_>) -> bool {
    operands.is_aligned()
        && operands.batch == 1
        && operands.inputs > 0
        && (1..=MOST_ROWS).contains(&rows)
        && (operands.then == Then::Store || operands.out.dtype == Dtype::Bf16)
        && (operands.then != Then::Gate || apart(operands.x.slice, operands.out.slice))
        && norms(rows, operands)
}

/// The product; lengths are checked by the caller.
pub(super) fn launch(
    on: Queue<'_>,
    rows: Rows<'_>,
    operands: &Linear<'_>,
) -> Result<(), CudaError> {
    const OP: &str = "linear";
    let Linear { x, x_stride, w, bias, out, out_stride, inputs, outputs, then, .. } = *operands;
    let refused = || shape(OP, format!("{operands:?} as a stream"));
    if !takes(rows.padded, operands) {
        return Err(refused());
    }
    let staged = staged(rows.padded, inputs);
    let pairs = then == Then::Gate;
    let weights = bytes(OP, &[outputs, inputs, if pairs { 4 } else { 2 }])?;
    let beside =
        Beside { own: SHARED, staying: (!staged).then_some(inputs), half: Half::of(weights) };
    let (ring, shared) = Ring::fit(inputs, rows.padded, beside).ok_or_else(refused)?;
    let params = Params {
        x: x.address(),
        w: w.address(),
        bias: bias.map_or(0, DeviceSlice::address),
        out: out.address(),
        count: rows.count_address(),
        x_stride: x_stride as u64,
        out_stride: out_stride as u64,
        tokens: dim(OP, rows.padded)?,
        columns: dim(OP, inputs)?,
        outputs: dim(OP, outputs)?,
        pairs: u32::from(pairs),
        add: u32::from(then == Then::Add),
        out_f32: u32::from(out.dtype == Dtype::F32),
        ring,
        eps: operands.norm.map_or(0.0, |norm| norm.eps),
        norm: operands.norm.map_or(0, |norm| norm.weight.address()),
        normed: operands.norm.map_or(0, |norm| norm.out.address()),
    };
    let kernel = on.kernel(if staged { "linear_stream_staged" } else { "linear_stream" })?;
    // Whole tiles, so that small products leave multiprocessors to the kernel behind.
    let tile = if pairs { TILE / 2 } else { TILE };
    let blocks = dim(OP, outputs.div_ceil(tile).min(on.multiprocessors()))?;
    Launch::new(kernel, [blocks, 1, 1], THREADS).shared(shared).dependent().on(on.stream, &params)
}
