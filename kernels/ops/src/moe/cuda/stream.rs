//! The experts of up to eight tokens in one launch at the speed of reading their weights, with experts
//! that every token takes beside the chosen ones.
//!
//! Wants bf16 and widths in multiples of 8. A launch begins before the one in front has ended, and reads
//! weights and the number of real rows before waiting for it: no kernel right in front may write those.
//! Invariant: a token's sum runs over its experts in the order of their numbers, so that it does not
//! depend on the others.

#[cfg(test)]
mod tests;

use super::{ExpertWeights, RouteParams, Routing, Scores, Scratch};
use crate::cuda::{Dtype, Queue, Rows, dim, need, shape};
use crate::linear::cuda::stream::{
    LEAST_STAGES, MOST_COLUMNS, MOST_ROWS, MOST_STAGES, TILE as ROWS, WHOLE, odd,
};
use device::cuda::{Context, CudaError, DeviceMemory, DeviceSlice, Launch, Parameters, Stream};

const OP: &str = "experts";
/// What the kernels have room for: experts here, and choices of all tokens.
const MOST_HELD: usize = 512;
const MOST_PAIRS: usize = 128;
/// Bytes of `MoeShared`.
const SHARED: usize = 11_008;
/// Bytes of sums of a tile that are kept.
const KEPT: usize = 2_048;
/// Multiprocessors that a device has at least.
const LEAST_BLOCKS: usize = 100;
const THREADS: u32 = 320;
/// Outputs of a tile of the first product, each of gate and up.
const TILE: usize = 4;
/// The kernel.
pub(crate) const KERNEL: &str = "moe_stream";

/// What blocks of a launch count together. Launches that use it run one after the other.
#[derive(Debug)]
pub(crate) struct Counters(DeviceSlice);

impl Counters {
    pub(crate) const BYTES: usize = 144;

    /// All zero, as every launch leaves them.
    pub(crate) fn new(context: &Context) -> Result<Self, CudaError> {
        let counters = DeviceMemory::allocate(context, "counters of experts' tiles", Self::BYTES)?;
        let stream = Stream::new(context)?;
        stream.fill(&counters, 0)?;
        stream.synchronize()?;
        Ok(Self(counters))
    }
}

/// Experts that every token takes, as one.
#[derive(Clone, Copy, Debug)]
pub struct Always<'a> {
    /// `[2 * width, hidden]`, gate and up.
    pub gate_up: &'a DeviceSlice,
    /// `[hidden, width]`.
    pub down: &'a DeviceSlice,
    /// Width inside.
    pub width: usize,
}

/// Where the sum goes.
#[derive(Clone, Copy, Debug)]
pub struct Sum<'a> {
    /// `[rows, hidden]`.
    pub out: &'a DeviceSlice,
    /// Whether it is added to what is there.
    pub add: bool,
}

/// Columns that a warp takes at once.
const UNIT: usize = 32;

/// Bytes of weights under way to a multiprocessor before the kernel knows what else it reads.
const UNDER_WAY: usize = 104 << 10;

/// Mirrors `runs::Ring`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ring {
    stages: u32,
    stage_bytes: u32,
    step: u32,
    pitch: u32,
    x_pitch: u32,
    under_way: u32,
}

const fn narrow(n: usize) -> Option<u32> {
    if n <= u32::MAX as usize { Some(n as u32) } else { None }
}

impl Ring {
    /// For weights of up to `columns` columns, and `coming` tokens that come with every stage; how many
    /// stages there are is not known yet.
    fn new(columns: usize, coming: usize) -> Option<Self> {
        let parts = columns.div_ceil(MOST_COLUMNS).max(1);
        let step =
            if parts == 1 { columns } else { columns.div_ceil(parts).next_multiple_of(UNIT) };
        let x_pitch = odd(2 * if coming == 0 { columns } else { step });
        Some(Self {
            stages: 0,
            stage_bytes: narrow((ROWS * 2 * step + coming * x_pitch).next_multiple_of(128))?,
            step: narrow(step)?,
            pitch: narrow(2 * step)?,
            x_pitch: narrow(x_pitch)?,
            under_way: narrow((UNDER_WAY / (2 * step * ROWS)).clamp(2, MOST_STAGES))?,
        })
    }

    /// Two in the same memory, one used after the other, beside `own` bytes of the kernel's and `tokens`
    /// that stay for the first; with the bytes of shared memory.
    fn join(rings: [Self; 2], own: usize, tokens: usize) -> Option<([Self; 2], u32)> {
        let stage_bytes = rings[0].stage_bytes.max(rings[1].stage_bytes);
        let fixed = own + (tokens * rings[0].x_pitch as usize).next_multiple_of(128);
        let stages = (WHOLE.saturating_sub(fixed) / stage_bytes as usize).min(MOST_STAGES);
        let shared = narrow(fixed + stages * stage_bytes as usize)?;
        // What is under way is waited for before its stage is used again.
        let joined = rings.map(|ring| Self {
            stages: stages as u32,
            stage_bytes,
            under_way: ring.under_way.min(stages as u32),
            ..ring
        });
        (stages >= LEAST_STAGES).then_some((joined, shared))
    }
}

/// Mirrors `Chosen`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Chosen {
    experts: u64,
    weights: u64,
    route: RouteParams,
    top_k: u32,
    first: u32,
    held: u32,
}

/// Mirrors `MoeStreamParams`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    x: u64,
    gate_up: u64,
    down: u64,
    always_gate_up: u64,
    always_down: u64,
    h: u64,
    always_h: u64,
    counters: u64,
    out: u64,
    count: u64,
    tokens: u32,
    hidden: u32,
    inner: u32,
    always: u32,
    rings: [Ring; 2],
    chosen: Chosen,
    add: u32,
    pad: u32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `experts`.
unsafe impl Parameters for Params {}

/// Whether the kernel chooses by such scores itself: a router without groups, in registers.
#[must_use]
pub fn chooses(scores: &Scores<'_>) -> bool {
    let router = scores.router;
    scores.logits.dtype == Dtype::F32 && router.limit.is_none() && router.experts <= MOST_HELD
}

/// The ring as both products use it on so many blocks, and bytes of shared memory.
fn rings(
    rows: usize,
    hidden: usize,
    inner: usize,
    always: usize,
    blocks: usize,
) -> Option<([Ring; 2], u32)> {
    let own = SHARED + hidden.div_ceil(blocks).div_ceil(ROWS) * KEPT;
    Ring::join([Ring::new(hidden, 0)?, Ring::new(inner.max(always), rows)?], own, rows)
}

/// Whether the kernel takes experts of this shape for steps of `rows` rows.
#[must_use]
pub fn takes(
    rows: usize,
    weights: &ExpertWeights<'_>,
    top_k: usize,
    always: Option<&Always<'_>>,
) -> bool {
    let ExpertWeights { held, gate_up, down, hidden, intermediate, .. } = *weights;
    let width = always.map_or(0, |always| always.width);
    let slices = always.map(|always| [always.gate_up.address(), always.down.address()]);
    let addresses = [gate_up.address(), down.address()].into_iter();
    gate_up.dtype == Dtype::Bf16
        && (1..=MOST_ROWS).contains(&rows)
        && held <= MOST_HELD
        && MOST_ROWS * top_k <= MOST_PAIRS
        && [hidden, intermediate].iter().all(|n| *n > 0 && n.is_multiple_of(8))
        && width.is_multiple_of(8)
        // What a step's scratch has room for.
        && width <= 2 * top_k * intermediate
        && addresses.chain(slices.into_iter().flatten()).all(|at| at.is_multiple_of(16))
        && rings(rows, hidden, intermediate, width, hidden.min(LEAST_BLOCKS)).is_some()
}

/// `sum_j weight_j * down_j(silu(gate_j x) * up_j x)` over the chosen experts, and the same of those
/// that every token takes with weight 1; `x` is `[rows, hidden]`. Experts that live elsewhere add
/// nothing. With `scores` the choice is made here, and left in `routing`.
///
/// # Errors
/// When [`takes`] does not hold, or [`chooses`] of scores that are given, an operand is too short, or a
/// launch fails.
#[allow(clippy::too_many_arguments, reason = "the operands of the op")]
pub fn experts(
    on: Queue<'_>,
    rows: Rows<'_>,
    x: &DeviceSlice,
    routing: &Routing<'_>,
    scores: Option<&Scores<'_>>,
    weights: &ExpertWeights<'_>,
    always: Option<&Always<'_>>,
    sum: &Sum<'_>,
    scratch: &Scratch,
) -> Result<(), CudaError> {
    let ExpertWeights { first, held, gate_up, down, hidden, intermediate } = *weights;
    let (padded, top_k) = (rows.padded, routing.top_k);
    let width = always.map_or(0, |always| always.width);
    let refused = || shape(OP, format!("{padded} rows of {hidden}, {held} experts, {top_k} each"));
    if !takes(padded, weights, top_k, always) || scores.is_some_and(|scores| !chooses(scores)) {
        return Err(refused());
    }
    let route = match scores {
        Some(scores) => RouteParams::new(rows, scores, routing)?,
        None => RouteParams::default(),
    };
    need(OP, "x", x, &[padded, hidden], 2)?;
    gate_up.need(OP, "gate_up", &[held, 2, intermediate, hidden])?;
    need(OP, "down", down, &[held, hidden, intermediate], 2)?;
    need(OP, "out", sum.out, &[padded, hidden], 2)?;
    need(OP, "chosen", routing.chosen, &[padded, top_k], 4)?;
    need(OP, "weights", routing.weights, &[padded, top_k], 4)?;
    need(OP, "scratch", &scratch.inner, &[padded, top_k, intermediate], 2)?;
    need(OP, "scratch beside", &scratch.gate_up, &[padded, width], 2)?;
    if let Some(always) = always {
        need(OP, "gate_up of all", always.gate_up, &[2, width, hidden], 2)?;
        need(OP, "down of all", always.down, &[hidden, width], 2)?;
    }
    let tiles = (held.min(padded * top_k) * intermediate + width).div_ceil(TILE);
    let blocks = tiles.max(hidden).min(on.multiprocessors());
    let rings = rings(padded, hidden, intermediate, width, blocks);
    let (rings, shared) = rings.ok_or_else(refused)?;
    let params = Params {
        x: x.address(),
        gate_up: gate_up.address(),
        down: down.address(),
        always_gate_up: always.map_or(0, |always| always.gate_up.address()),
        always_down: always.map_or(0, |always| always.down.address()),
        h: scratch.inner.address(),
        always_h: scratch.gate_up.address(),
        counters: on.counters().0.address(),
        out: sum.out.address(),
        count: rows.count_address(),
        tokens: dim(OP, padded)?,
        hidden: dim(OP, hidden)?,
        inner: dim(OP, intermediate)?,
        always: dim(OP, width)?,
        rings,
        chosen: Chosen {
            experts: routing.chosen.address(),
            weights: routing.weights.address(),
            route,
            top_k: dim(OP, top_k)?,
            first: dim(OP, first)?,
            held: dim(OP, held)?,
        },
        add: u32::from(sum.add),
        pad: 0,
    };
    Launch::new(on.kernel(KERNEL)?, [dim(OP, blocks)?, 1, 1], THREADS)
        .shared(shared)
        .dependent()
        .on(on.stream, &params)
}
