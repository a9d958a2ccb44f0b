//! Launches of the mixture of experts: routing, and the weighted sum of the chosen experts, sorted by
//! expert on the device without asking the host.
//!
//! The experts of a layer lie side by side: `gate_up` is `[held, 2 * intermediate, hidden]` (gate, then
//! up), `down` is `[held, hidden, intermediate]`. Five launches: sort, two products, the activation
//! between them, the sum. Where operands are aligned, rows are laid by expert before, the activation is
//! in the first product (`wide`), and for many tokens both products are one launch (`many`). A token's
//! result does not depend on the others.

mod lay;
pub(crate) mod many;
pub mod stream;
#[cfg(test)]
mod tests;
pub(crate) mod wide;

use super::{GroupLimit, GroupScore, MAX_EXPERTS, Router, Scoring};
use crate::act;
use crate::cuda::{Dtype, Queue, Rows, Tensor, bytes, dim, need, shape};
use crate::linear::cuda::{self as linear, Grouped, Variant};
use device::cuda::{Arena, CudaError, DeviceSlice, Launch, Parameters};
use lay::Lay;
pub use many::Joined;

/// Experts of a token, at most: each in a lane of a warp.
const LANES: usize = 32;

/// Mirrors `RouteParams`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct RouteParams {
    logits: u64,
    correction: u64,
    chosen: u64,
    weights: u64,
    count: u64,
    rows: u32,
    experts: u32,
    top_k: u32,
    sigmoid: u32,
    groups: u32,
    open_groups: u32,
    sum_top2: u32,
    norm_topk: u32,
    scale: f32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `new`.
unsafe impl Parameters for RouteParams {}

/// The choices of a step, on the device.
#[derive(Clone, Copy, Debug)]
pub struct Routing<'a> {
    /// u32 `[rows, top_k]`: number of the expert.
    pub chosen: &'a DeviceSlice,
    /// f32 `[rows, top_k]`: its weight.
    pub weights: &'a DeviceSlice,
    /// Experts per token.
    pub top_k: usize,
}

/// What experts are chosen by.
#[derive(Clone, Copy, Debug)]
pub struct Scores<'a> {
    /// `[rows, experts]`.
    pub logits: Tensor<'a>,
    /// Its correction is not looked at.
    pub router: &'a Router<'a>,
    /// The correction's device copy, f32 `[experts]`.
    pub correction: Option<&'a DeviceSlice>,
}

impl RouteParams {
    fn new(rows: Rows<'_>, scores: &Scores<'_>, routing: &Routing<'_>) -> Result<Self, CudaError> {
        const OP: &str = "route";
        let Scores { logits, router, correction } = *scores;
        let Router { experts, top_k, scoring, limit, norm_topk, scale, .. } = *router;
        let (groups, open, sum_top2) = limit.map_or((0, 0, false), |limit: GroupLimit| {
            (limit.groups, limit.chosen, limit.score == GroupScore::SumTop2)
        });
        let grouped = limit.is_none()
            || groups > 0
                && experts.is_multiple_of(groups)
                && open <= groups
                && experts / groups * open >= top_k;
        let counts = experts <= MAX_EXPERTS && (1..=experts.min(LANES)).contains(&top_k);
        if !grouped || !counts || routing.top_k != top_k {
            return Err(shape(OP, format!("{router:?}")));
        }
        logits.need(OP, "logits", &[rows.padded, experts])?;
        need(OP, "chosen", routing.chosen, &[rows.padded, top_k], 4)?;
        need(OP, "weights", routing.weights, &[rows.padded, top_k], 4)?;
        if let Some(correction) = correction {
            need(OP, "correction", correction, &[experts], 4)?;
        }
        Ok(Self {
            logits: logits.address(),
            correction: correction.map_or(0, DeviceSlice::address),
            chosen: routing.chosen.address(),
            weights: routing.weights.address(),
            count: rows.count_address(),
            rows: dim(OP, rows.padded)?,
            experts: dim(OP, experts)?,
            top_k: dim(OP, top_k)?,
            sigmoid: u32::from(scoring == Scoring::Sigmoid),
            groups: dim(OP, groups)?,
            open_groups: dim(OP, open)?,
            sum_top2: u32::from(sum_top2),
            norm_topk: u32::from(norm_topk),
            scale,
        })
    }
}

/// Chooses for every token.
///
/// # Errors
/// When the router makes no sense, an operand is too short, or the launch fails.
pub fn route(
    on: Queue<'_>,
    rows: Rows<'_>,
    scores: &Scores<'_>,
    routing: &Routing<'_>,
) -> Result<(), CudaError> {
    let params = RouteParams::new(rows, scores, routing)?;
    /// Three arrays of a warp; four warps of the most experts fit the default of 48 KiB.
    const WARPS: u32 = 4;
    let kernel = on.kernel(scores.logits.dtype.pick("route_f32", "route_bf16"))?;
    let grid = [params.rows.div_ceil(WARPS), 1, 1];
    let shared = WARPS * 3 * 4 * params.experts;
    Launch::new(kernel, grid, 32 * WARPS).shared(shared).dependent().on(on.stream, &params)
}

/// The experts held here.
#[derive(Clone, Copy, Debug)]
pub struct ExpertWeights<'a> {
    /// Number of the first.
    pub first: usize,
    /// How many.
    pub held: usize,
    /// `[held, 2 * intermediate, hidden]`.
    pub gate_up: Tensor<'a>,
    /// `[held, hidden, intermediate]`, of the same type.
    pub down: &'a DeviceSlice,
    /// Width of a token.
    pub hidden: usize,
    /// Width inside an expert.
    pub intermediate: usize,
}

/// Memory of a step, made once.
#[derive(Clone, Debug)]
pub struct Scratch {
    pairs: DeviceSlice,
    places: DeviceSlice,
    tiles: DeviceSlice,
    /// Two u32: tiles and pairs.
    totals: DeviceSlice,
    gate_up: DeviceSlice,
    inner: DeviceSlice,
    y: DeviceSlice,
    /// How far many tokens are.
    progress: DeviceSlice,
}

/// Bytes of a `RowTile`.
const TILE: usize = 12;
/// Fewest rows of a tile.
const LEAST_TILE: usize = 8;

impl Scratch {
    /// Bytes of each part for steps of up to `rows` rows.
    const fn parts(
        dtype: Dtype,
        rows: usize,
        top_k: usize,
        held: usize,
        hidden: usize,
        intermediate: usize,
    ) -> [usize; 8] {
        let pairs = rows * top_k;
        let tiles = held + pairs / LEAST_TILE;
        let wide = pairs * intermediate * dtype.size();
        let y = pairs * hidden * dtype.size();
        let progress = many::progress(rows, pairs, held);
        [4 * pairs, 4 * pairs, tiles * TILE, 8, 2 * wide, wide, y, progress]
    }

    /// Bytes of device memory, for the memory plan.
    #[must_use]
    pub fn bytes(
        dtype: Dtype,
        rows: usize,
        top_k: usize,
        held: usize,
        hidden: usize,
        intermediate: usize,
    ) -> usize {
        let parts = Self::parts(dtype, rows, top_k, held, hidden, intermediate);
        parts.into_iter().map(Arena::padded).sum()
    }

    /// Cuts it from an arena.
    ///
    /// # Errors
    /// When the arena is used up.
    pub fn take(
        arena: &mut Arena,
        dtype: Dtype,
        rows: usize,
        top_k: usize,
        held: usize,
        hidden: usize,
        intermediate: usize,
    ) -> Result<Self, CudaError> {
        let parts = Self::parts(dtype, rows, top_k, held, hidden, intermediate);
        let mut next = parts.into_iter();
        let mut take = || arena.take("experts", next.next().unwrap_or(0));
        Ok(Self {
            pairs: take()?,
            places: take()?,
            tiles: take()?,
            totals: take()?,
            gate_up: take()?,
            inner: take()?,
            y: take()?,
            progress: take()?,
        })
    }
}

/// Mirrors `GroupParams`.
#[repr(C)]
#[derive(Clone, Copy)]
struct GroupParams {
    chosen: u64,
    count: u64,
    pairs: u64,
    places: u64,
    tiles: u64,
    totals: u64,
    rows: u32,
    top_k: u32,
    first: u32,
    held: u32,
    tile_rows: u32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `experts`.
unsafe impl Parameters for GroupParams {}

/// Mirrors `CombineParams`.
#[repr(C)]
#[derive(Clone, Copy)]
struct CombineParams {
    y: u64,
    places: u64,
    weights: u64,
    out: u64,
    beside: u64,
    residual: u64,
    norm: u64,
    count: u64,
    rows: u32,
    top_k: u32,
    width: u32,
    eps: f32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `combine`.
unsafe impl Parameters for CombineParams {}

/// Sorts the pairs by expert.
fn group(on: Queue<'_>, params: &GroupParams) -> Result<(), CudaError> {
    let kernel = on.kernel("group_pairs")?;
    Launch::new(kernel, [1, 1, 1], 1024).shared(8 * params.held).on(on.stream, params)
}

/// Rows up to which both products stream through registers, where they are aligned.
const FEW_ROWS: usize = 8;

/// The kernels of both products where those of `linear` are taken, for steps of `rows` rows.
#[must_use]
pub const fn select(aligned: bool, rows: usize, top_k: usize, held: usize) -> Variant {
    if !aligned {
        return Variant::Any;
    }
    // Pairs of an expert if all were equally busy; the tensor cores take 8 or 16 rows for one.
    let each = (rows * top_k).div_ceil(if held == 0 { 1 } else { held });
    match each {
        _ if rows <= FEW_ROWS => Variant::Few { rows: 8, outputs: 16 },
        0..=24 => Variant::Few { rows: 16, outputs: 16 },
        25..=96 => Variant::Many { rows: 64 },
        _ => Variant::Many { rows: 128 },
    }
}

/// `y = down (silu(gate x) * up x)` by sorted place, with the products of `linear`.
fn products(
    variant: Variant,
    on: Queue<'_>,
    mut sorted: Grouped<'_>,
    x: Tensor<'_>,
    weights: &ExpertWeights<'_>,
    scratch: &Scratch,
    max_pairs: usize,
) -> Result<(), CudaError> {
    let ExpertWeights { gate_up, down, hidden, intermediate, .. } = *weights;
    let tensor = |slice| Tensor::new(slice, x.dtype);
    let [wide, inner, y] = [&scratch.gate_up, &scratch.inner, &scratch.y].map(tensor);
    let outputs = 2 * intermediate;
    linear::grouped(variant, on, &sorted, x, gate_up.slice, wide, hidden, outputs)?;
    let real = scratch.totals.slice(4..8);
    let rows = Rows { padded: max_pairs, count: Some(&real) };
    act::cuda::silu_mul(on, rows, intermediate, wide, inner.slice)?;
    sorted.gather = None;
    linear::grouped(variant, on, &sorted, inner, down, y, intermediate, hidden)
}

/// `out = sum_j weight_j * down_j(silu(gate_j x) * up_j x)`; `x` and `out` are `[rows, hidden]` of the
/// weights' type. Experts that live elsewhere add nothing.
///
/// # Errors
/// When shapes do not fit, an operand is too short, or a launch fails.
pub fn experts(
    on: Queue<'_>,
    rows: Rows<'_>,
    x: &DeviceSlice,
    routing: &Routing<'_>,
    weights: &ExpertWeights<'_>,
    out: &DeviceSlice,
    scratch: &Scratch,
) -> Result<(), CudaError> {
    results(on, rows, x, routing, weights, None, scratch)?;
    let to = Combined { dtype: weights.gate_up.dtype, hidden: weights.hidden, out };
    combine(on, rows, routing, scratch, &to, None)
}

/// Whether operands of bf16 products lie as the fast kernels want them.
fn is_aligned(dtype: Dtype, widths: [usize; 2], addresses: [u64; 3]) -> bool {
    dtype == Dtype::Bf16
        && widths.iter().all(|n| n.is_multiple_of(8))
        && addresses.iter().all(|at| at.is_multiple_of(16))
}

/// Whether experts of this shape, aligned, run in one launch for steps of `rows` rows.
const fn in_one(rows: usize, top_k: usize, held: usize, hidden: usize, width: usize) -> bool {
    let each = (rows * top_k).div_ceil(if held == 0 { 1 } else { held });
    rows > FEW_ROWS
        && held > 0
        && lay::takes(held, top_k)
        && many::takes(hidden, width)
        && many::pays(each)
}

/// Whether [`results`] takes experts of every row along, for steps of `rows` rows.
#[must_use]
pub fn joins(
    rows: usize,
    weights: &ExpertWeights<'_>,
    top_k: usize,
    always: &stream::Always<'_>,
) -> bool {
    let ExpertWeights { held, gate_up, down, hidden, intermediate, .. } = *weights;
    let of_all = [always.gate_up.address(), always.down.address(), 0];
    is_aligned(gate_up.dtype, [hidden, intermediate], [gate_up.address(), down.address(), 0])
        && is_aligned(gate_up.dtype, [hidden, always.width], of_all)
        && in_one(rows, top_k, held, hidden, intermediate)
        && many::takes(hidden, always.width)
}

/// What the chosen experts make of `x`, left in the scratch for [`combine`]; of `joined` ones, where
/// [`joins`] says so, in their own memory.
///
/// # Errors
/// As [`experts`].
pub fn results(
    on: Queue<'_>,
    rows: Rows<'_>,
    x: &DeviceSlice,
    routing: &Routing<'_>,
    weights: &ExpertWeights<'_>,
    joined: Option<Joined<'_>>,
    scratch: &Scratch,
) -> Result<(), CudaError> {
    const OP: &str = "experts";
    let ExpertWeights { held, gate_up, hidden, intermediate, .. } = *weights;
    let top_k = routing.top_k;
    let dtype = gate_up.dtype;
    if held > MAX_EXPERTS || top_k == 0 {
        return Err(shape(OP, format!("{held} experts, {top_k} per token")));
    }
    gate_up.need(OP, "gate_up", &[held, 2, intermediate, hidden])?;
    let size = dtype.size();
    need(OP, "down", weights.down, &[held, hidden, intermediate], size)?;
    need(OP, "x", x, &[rows.padded, hidden], size)?;
    need(OP, "chosen", routing.chosen, &[rows.padded, top_k], 4)?;
    need(OP, "weights", routing.weights, &[rows.padded, top_k], 4)?;
    let pairs = bytes(OP, &[rows.padded, top_k])?;
    need(OP, "scratch", &scratch.pairs, &[pairs], 4)?;
    need(OP, "scratch", &scratch.y, &[pairs, hidden], size)?;
    need(OP, "scratch", &scratch.gate_up, &[pairs, 2, intermediate], size)?;

    let addresses = [x.address(), gate_up.address(), weights.down.address()];
    let aligned = is_aligned(dtype, [hidden, intermediate], addresses);
    let variant = select(aligned, rows.padded, top_k, held);
    let in_one = aligned && in_one(rows.padded, top_k, held, hidden, intermediate);
    let wide = aligned && rows.padded > FEW_ROWS && held > 0 && lay::takes(held, top_k);
    let tile_rows = match (in_one, wide) {
        (true, _) => many::ROWS,
        (false, true) => wide::ROWS,
        (false, false) => variant.tile_rows(),
    };
    if let Some(Joined { always, inner, out }) = &joined {
        let (gate_up, down, width) = (always.gate_up, always.down, always.width);
        if !in_one || !joins(rows.padded, weights, top_k, always) {
            return Err(shape(OP, format!("experts of {width} with {weights:?}")));
        }
        need(OP, "gate_up of all rows", gate_up, &[2, width, hidden], size)?;
        need(OP, "down of all rows", down, &[hidden, width], size)?;
        need(OP, "inner of all rows", inner, &[rows.padded, width], size)?;
        need(OP, "results of all rows", out, &[rows.padded, hidden], size)?;
    }
    // Every expert's last tile may be part full, and no tile is empty.
    let max_tiles = (held + pairs / tile_rows).min(pairs);
    need(OP, "tiles", &scratch.tiles, &[max_tiles], TILE)?;

    let sorting = GroupParams {
        chosen: routing.chosen.address(),
        count: rows.count_address(),
        pairs: scratch.pairs.address(),
        places: scratch.places.address(),
        tiles: scratch.tiles.address(),
        totals: scratch.totals.address(),
        rows: dim(OP, rows.padded)?,
        top_k: dim(OP, top_k)?,
        first: dim(OP, weights.first)?,
        held: dim(OP, held)?,
        tile_rows: dim(OP, tile_rows)?,
    };
    let laid = Lay {
        x,
        to: &scratch.y,
        counts: &scratch.pairs,
        progress: None,
        hidden,
        max_rows: rows.padded,
        group: sorting,
    };
    if in_one {
        let progress = many::progress(rows.padded, pairs, held);
        need(OP, "progress", &scratch.progress, &[progress], 1)?;
        let progress = scratch.progress.slice(0..progress);
        lay::lay(on, &Lay { progress: Some(&progress), ..laid })?;
        let products = many::Products {
            x,
            gate_up: gate_up.slice,
            down: weights.down,
            held,
            hidden,
            intermediate,
            max_pairs: pairs,
            tiles: &scratch.tiles,
            totals: &scratch.totals,
            progress: &progress,
            inner: &scratch.inner,
            y: &scratch.y,
            joined,
        };
        many::products(on, rows, &products)?;
    } else if wide {
        lay::lay(on, &laid)?;
        let products = wide::Products {
            gate_up: gate_up.slice,
            down: weights.down,
            held,
            hidden,
            intermediate,
            max_pairs: pairs,
            tiles: &scratch.tiles,
            totals: &scratch.totals,
            inner: &scratch.inner,
            y: &scratch.y,
        };
        wide::products(on, &products)?;
    } else {
        group(on, &sorting)?;
        let sorted = Grouped {
            tiles: &scratch.tiles,
            max_tiles,
            tile_count: &scratch.totals,
            gather: Some((&scratch.pairs, top_k)),
        };
        products(variant, on, sorted, Tensor::new(x, dtype), weights, scratch, pairs)?;
    }
    Ok(())
}

/// Widest row that a block of 256 threads has in vectors of eight.
const SHORT_ROW: usize = 256 * 8;
/// Choices whose results a thread reads at once; mirrors `kChoices`.
const CHOICES: usize = 8;

/// Where the sum over experts goes.
#[derive(Clone, Copy, Debug)]
pub struct Combined<'a> {
    /// Elements of experts' results, and of `out`.
    pub dtype: Dtype,
    /// Width of a token.
    pub hidden: usize,
    /// `[rows, hidden]`: the sum, or the norm behind it.
    pub out: &'a DeviceSlice,
}

/// What follows the sum in the same launch: `residual += sum + beside; out = norm(residual) * weight`.
#[derive(Clone, Copy, Debug)]
pub struct Behind<'a> {
    /// `[rows, hidden]`, of the same type.
    pub beside: Option<&'a DeviceSlice>,
    /// `[rows, hidden]`, of the same type.
    pub residual: &'a DeviceSlice,
    /// f32 `[hidden]`.
    pub weight: &'a DeviceSlice,
    /// Of the norm.
    pub eps: f32,
    /// Whether everything that is read was enqueued on this very stream.
    pub follows: bool,
}

/// The weighted sum of what [`results`] left. With `behind` every sum is rounded where the ops one by
/// one store it, so the bits are theirs.
///
/// # Errors
/// When an operand is too short, or the launch fails.
pub fn combine(
    on: Queue<'_>,
    rows: Rows<'_>,
    routing: &Routing<'_>,
    scratch: &Scratch,
    to: &Combined<'_>,
    behind: Option<&Behind<'_>>,
) -> Result<(), CudaError> {
    const OP: &str = "combine";
    let (Combined { dtype, hidden, out }, top_k) = (*to, routing.top_k);
    let wide = [rows.padded, hidden];
    let pairs = bytes(OP, &[rows.padded, top_k])?;
    need(OP, "out", out, &wide, dtype.size())?;
    need(OP, "results", &scratch.y, &[pairs, hidden], dtype.size())?;
    need(OP, "places", &scratch.places, &[pairs], 4)?;
    need(OP, "weights", routing.weights, &[pairs], 4)?;
    let mut params = CombineParams {
        y: scratch.y.address(),
        places: scratch.places.address(),
        weights: routing.weights.address(),
        out: out.address(),
        beside: 0,
        residual: 0,
        norm: 0,
        count: rows.count_address(),
        rows: dim(OP, rows.padded)?,
        top_k: dim(OP, top_k)?,
        width: dim(OP, hidden)?,
        eps: 0.0,
    };
    let Some(Behind { beside, residual, weight, eps, follows }) = behind else {
        let kernel = on.kernel(dtype.pick("combine_f32", "combine_bf16"))?;
        let parts = params.width.div_ceil(256 * 8);
        return Launch::new(kernel, [params.rows, parts, 1], 256)
            .dependent()
            .on(on.stream, &params);
    };
    if let Some(beside) = beside {
        need(OP, "beside", beside, &wide, dtype.size())?;
        params.beside = beside.address();
    }
    need(OP, "residual", residual, &wide, dtype.size())?;
    need(OP, "weight", weight, &[hidden], 4)?;
    (params.residual, params.norm, params.eps) = (residual.address(), weight.address(), *eps);
    let addresses = [params.y, params.out, params.beside, params.residual];
    let aligned = hidden.is_multiple_of(8) && addresses.iter().all(|at| at.is_multiple_of(16));
    let short = dtype == Dtype::Bf16 && aligned && hidden <= SHORT_ROW && top_k <= CHOICES;
    let kernel = match short {
        true => on.kernel("combine_norm_short")?,
        false => on.kernel(dtype.pick("combine_norm_f32", "combine_norm_bf16"))?,
    };
    let launch = Launch::new(kernel, [params.rows, 1, 1], 256);
    // Where two streams meet in front of it, it may not begin before they have.
    let launch = if *follows { launch.dependent() } else { launch };
    launch.on(on.stream, &params)
}
