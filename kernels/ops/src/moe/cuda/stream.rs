//! The experts of up to eight tokens in two launches at the speed of reading their weights, with experts
//! that every token takes beside the chosen ones.
//!
//! Wants bf16 and widths in multiples of 8. Invariant: a token's sum runs over its experts in the order
//! of their numbers, so that it does not depend on the others.

#[cfg(test)]
mod tests;

use super::{ExpertWeights, RouteParams, Routing, Scores, Scratch};
use crate::cuda::{Dtype, Queue, Rows, dim, need, shape};
use crate::linear::cuda::stream::{Beside, MOST_ROWS, Ring, THREADS};
use device::cuda::{CudaError, DeviceSlice, Launch, Parameters};

const OP: &str = "experts";
/// What the kernels have room for: experts here, and choices of all tokens.
const MOST_HELD: usize = 512;
const MOST_PAIRS: usize = 128;
/// Bytes of `MoeShared`.
const SHARED: usize = 10_880;
/// Bytes of `TouchedList`.
pub(super) const LIST: usize = 6_160;
/// Outputs of a tile of the first product, each of gate and up.
const TILE: usize = 4;

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
    chosen: u64,
    weights: u64,
    list: u64,
    out: u64,
    count: u64,
    tokens: u32,
    hidden: u32,
    inner: u32,
    always: u32,
    top_k: u32,
    first: u32,
    held: u32,
    add: u32,
    ring: Ring,
    route: RouteParams,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `experts`.
unsafe impl Parameters for Params {}

/// Whether the first kernel chooses by such scores itself: a router without groups, in registers.
#[must_use]
pub fn chooses(scores: &Scores<'_>) -> bool {
    let router = scores.router;
    scores.logits.dtype == Dtype::F32 && router.limit.is_none() && router.experts <= MOST_HELD
}

/// The rings of both products, and bytes of shared memory.
fn rings(rows: usize, hidden: usize, inner: usize, always: usize) -> Option<[(Ring, u32); 2]> {
    let beside = |staying| Beside { own: SHARED, staying, half: false };
    let up = Ring::fit(hidden, rows, beside(Some(hidden)))?;
    Some([up, Ring::fit(inner.max(always), rows, beside(None))?])
}

/// Whether the kernels take experts of this shape for steps of `rows` rows.
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
        && rings(rows, hidden, intermediate, width).is_some()
}

/// `sum_j weight_j * down_j(silu(gate_j x) * up_j x)` over the chosen experts, and the same of those
/// that every token takes with weight 1; `x` is `[rows, hidden]`. Experts that live elsewhere add
/// nothing. With `scores` the choice is made here, and left in `routing`.
///
/// # Errors
/// When [`takes`] does not hold, or [`chooses`] of scores that are given, an operand is too short, or a launch fails.
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
    need(OP, "list", &scratch.list, &[LIST], 1)?;
    need(OP, "scratch", &scratch.inner, &[padded, top_k, intermediate], 2)?;
    need(OP, "scratch beside", &scratch.gate_up, &[padded, width], 2)?;
    if let Some(always) = always {
        need(OP, "gate_up of all", always.gate_up, &[2, width, hidden], 2)?;
        need(OP, "down of all", always.down, &[hidden, width], 2)?;
    }
    let [up, second] = rings(padded, hidden, intermediate, width).ok_or_else(refused)?;
    let mut params = Params {
        x: x.address(),
        gate_up: gate_up.address(),
        down: down.address(),
        always_gate_up: always.map_or(0, |always| always.gate_up.address()),
        always_down: always.map_or(0, |always| always.down.address()),
        h: scratch.inner.address(),
        always_h: scratch.gate_up.address(),
        chosen: routing.chosen.address(),
        weights: routing.weights.address(),
        list: scratch.list.address(),
        out: sum.out.address(),
        count: rows.count_address(),
        tokens: dim(OP, padded)?,
        hidden: dim(OP, hidden)?,
        inner: dim(OP, intermediate)?,
        always: dim(OP, width)?,
        top_k: dim(OP, top_k)?,
        first: dim(OP, first)?,
        held: dim(OP, held)?,
        add: u32::from(sum.add),
        ring: up.0,
        route,
    };
    let tiles = (held.min(padded * top_k) * intermediate + width).div_ceil(TILE);
    let blocks = [tiles.max(1), hidden].map(|most| most.min(on.multiprocessors()));
    for (name, (ring, shared), blocks) in
        [("moe_stream_up", up, blocks[0]), ("moe_stream_down", second, blocks[1])]
    {
        params.ring = ring;
        Launch::new(on.kernel(name)?, [dim(OP, blocks)?, 1, 1], THREADS)
            .shared(shared)
            .dependent()
            .on(on.stream, &params)?;
    }
    Ok(())
}
