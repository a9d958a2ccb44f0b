//! Both products of experts of many tokens in one launch, with experts that every row takes beside the
//! chosen ones.
//!
//! Wants bf16 and rows of `x` laid by sorted pair; [`takes`] says of which shapes, [`pays`] from how many
//! rows on. Invariant: the sum of an output runs over whole tiles in one block, so that it does not
//! depend on how many tokens other experts have.

#[cfg(test)]
mod tests;

use super::stream::Always;
use crate::cuda::{Queue, Rows, dim};
use crate::linear::cuda::wide::LINE;
use device::cuda::{CudaError, DeviceSlice, Launch, Parameters, Swizzle, TensorMap};

const OP: &str = "experts";
const KERNEL: &str = "experts_many";
/// Kernels that have more shared memory than the default.
pub(crate) const LARGE: &[&str] = &[KERNEL];

/// Warpgroups that compute.
const GROUPS: usize = 2;
/// Lines of weights of one.
const LINES: usize = 128;
/// Rows of a tile, at most.
pub(super) const ROWS: usize = 200;
/// Rows of a box.
const ROW_BOX: usize = 16;
/// Stages of rows, and of weights of a warpgroup.
const STAGES: [usize; 2] = [5, 3];
/// Bytes of the stages of a block, and of its barriers and units.
const RINGS: usize =
    (ROWS.next_multiple_of(ROW_BOX) * STAGES[0] + LINES * STAGES[1] * GROUPS) * 2 * LINE;
const OWN: usize = 16 * (STAGES[0] + GROUPS * STAGES[1] + 9);
/// The warpgroups, and two that read.
const THREADS: u32 = 128 * (GROUPS as u32 + 2);
/// Tokens of an expert, if all were equally busy, from which on this is faster than two launches.
const LEAST_EACH: usize = 48;

/// Experts that every row takes, with room for what they make.
#[derive(Clone, Copy, Debug)]
pub struct Joined<'a> {
    /// Their weights.
    pub always: Always<'a>,
    /// `[rows, width]`, for what is between both products.
    pub inner: &'a DeviceSlice,
    /// `[rows, hidden]`: their result.
    pub out: &'a DeviceSlice,
}

/// Mirrors `many::Product`.
#[repr(C, align(128))]
#[derive(Clone, Copy)]
struct Product {
    w: TensorMap,
    x: TensorMap,
    out: u64,
    out_stride: u64,
    lines: u32,
    steps: u32,
    expert: u32,
    reused: u32,
    pad: [u32; 24],
}

/// Mirrors `many::Params`.
#[repr(C, align(128))]
#[derive(Clone, Copy)]
struct Params {
    products: [Product; 4],
    totals: u64,
    count: u64,
    tiles: u64,
    progress: u64,
    rows: u32,
    always: u32,
    pad: [u32; 22],
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `results`.
unsafe impl Parameters for Params {}

/// Operands; lengths are checked by the caller.
#[derive(Clone, Copy)]
pub(super) struct Products<'a> {
    /// `[rows, hidden]`; read where experts join.
    pub(super) x: &'a DeviceSlice,
    /// `[held, 2, intermediate, hidden]`.
    pub(super) gate_up: &'a DeviceSlice,
    /// `[held, hidden, intermediate]`.
    pub(super) down: &'a DeviceSlice,
    pub(super) held: usize,
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    /// Pairs there can be.
    pub(super) max_pairs: usize,
    pub(super) tiles: &'a DeviceSlice,
    /// Tiles there are.
    pub(super) totals: &'a DeviceSlice,
    /// [`progress`] bytes, zero.
    pub(super) progress: &'a DeviceSlice,
    /// `[max_pairs, intermediate]`.
    pub(super) inner: &'a DeviceSlice,
    /// `[max_pairs, hidden]`: rows of `x` by sorted pair first, then the result.
    pub(super) y: &'a DeviceSlice,
    pub(super) joined: Option<Joined<'a>>,
}

/// Bytes of the counters of a step of `rows` rows: the units fetched, and one for every tile.
pub(super) const fn progress(rows: usize, pairs: usize, held: usize) -> usize {
    4 * (1 + rows.div_ceil(ROWS) + held + pairs / ROWS)
}

/// Whether the kernel takes experts of this width whose weights are on 16 bytes.
pub(super) const fn takes(hidden: usize, intermediate: usize) -> bool {
    hidden > 0 && intermediate > 0 && hidden.is_multiple_of(16) && intermediate.is_multiple_of(8)
}

/// Whether it is faster than two launches for so many tokens of an expert.
pub(super) const fn pays(each: usize) -> bool {
    each >= LEAST_EACH
}

/// Gate and up: `[batch, 2, n, inputs]`, boxes of [`LINES`] lines of both.
fn up_map(w: &DeviceSlice, batch: usize, n: usize, inputs: usize) -> Result<TensorMap, CudaError> {
    let boxes = [LINE as u32, 8, 2, (LINES / 16) as u32, 1];
    let [n, k] = [n as u64, inputs as u64];
    let dims = [k, 8, 2, n / 8, batch as u64];
    TensorMap::bf16_strided(w, dims, [1, k, n * k, 8 * k, 2 * n * k], boxes, Swizzle::Bytes128)
}

/// Down: `[batch, n, inputs]`, of each sixteen lines 0, 1, 4, 5, 8, 9, 12, 13, then the others, so that
/// a thread has four results in a row.
fn down_map(
    w: &DeviceSlice,
    batch: usize,
    n: usize,
    inputs: usize,
) -> Result<TensorMap, CudaError> {
    let boxes = [LINE as u32, 2, 4, 2, (LINES / 16) as u32];
    let k = inputs as u64;
    let dims = [k, 2, 4, 2, (batch * n / 16) as u64];
    TensorMap::bf16_strided(w, dims, [1, k, 4 * k, 2 * k, 16 * k], boxes, Swizzle::Bytes128)
}

fn rows_map(x: &DeviceSlice, rows: usize, inputs: usize) -> Result<TensorMap, CudaError> {
    let boxes = [LINE as u32, ROW_BOX as u32];
    TensorMap::bf16(x, [inputs as u64, rows as u64], boxes, Swizzle::Bytes128)
}

/// Experts of one width.
struct Experts<'a> {
    gate_up: &'a DeviceSlice,
    down: &'a DeviceSlice,
    batch: usize,
    hidden: usize,
    width: usize,
    /// Of `x`, `inner` and `out`.
    rows: usize,
    x: &'a DeviceSlice,
    inner: &'a DeviceSlice,
    out: &'a DeviceSlice,
    reused: bool,
}

impl Experts<'_> {
    /// Both products.
    fn products(&self) -> Result<[Product; 2], CudaError> {
        let Self { gate_up, down, batch, hidden, width, rows, x, inner, out, reused } = *self;
        let first = Product {
            w: up_map(gate_up, batch, width, hidden)?,
            x: rows_map(x, rows, hidden)?,
            out: inner.address(),
            out_stride: width as u64,
            lines: dim(OP, 2 * width)?,
            steps: dim(OP, hidden.div_ceil(LINE))?,
            expert: 1,
            reused: u32::from(reused),
            pad: [0; 24],
        };
        let second = Product {
            w: down_map(down, batch, hidden, width)?,
            x: rows_map(inner, rows, width)?,
            out: out.address(),
            out_stride: hidden as u64,
            lines: dim(OP, hidden)?,
            steps: dim(OP, width.div_ceil(LINE))?,
            expert: dim(OP, hidden / 16)?,
            ..first
        };
        Ok([first, second])
    }
}

/// `y = down (silu(gate x) * up x)` by sorted place, after laying, and the same of joined experts.
pub(super) fn products(on: Queue<'_>, rows: Rows<'_>, p: &Products<'_>) -> Result<(), CudaError> {
    let Products { held, hidden, intermediate, max_pairs, y, inner, .. } = *p;
    let chosen = Experts {
        gate_up: p.gate_up,
        down: p.down,
        batch: held,
        hidden,
        width: intermediate,
        rows: max_pairs,
        x: y,
        inner,
        out: y,
        reused: max_pairs / held.max(1) > ROWS,
    };
    let [up, down] = chosen.products()?;
    let [always_up, always_down] = match &p.joined {
        Some(Joined { always, inner, out }) => Experts {
            gate_up: always.gate_up,
            down: always.down,
            batch: 1,
            hidden,
            width: always.width,
            rows: rows.padded,
            x: p.x,
            inner,
            out,
            reused: true,
        }
        .products()?,
        None => [up, down],
    };
    let params = Params {
        products: [up, down, always_up, always_down],
        totals: p.totals.address(),
        count: rows.count_address(),
        tiles: p.tiles.address(),
        progress: p.progress.address(),
        rows: dim(OP, rows.padded)?,
        always: u32::from(p.joined.is_some()),
        pad: [0; 22],
    };
    // As many as run at once; one that finds no unit ends.
    let blocks = dim(OP, on.multiprocessors())?;
    Launch::new(on.kernel(KERNEL)?, [blocks, 1, 1], THREADS)
        .shared((RINGS + OWN) as u32)
        .dependent()
        .on(on.stream, &params)
}
