//! Both products of experts of many tokens in one launch, with experts that every row takes beside the
//! chosen ones.
//!
//! Wants bf16 and pairs sorted; [`takes`] says of which shapes, [`pays`] from how many rows on, [`kind`]
//! by which kernel. Invariant: the sum of an output runs over whole tiles in one block, so that it does
//! not depend on how many tokens other experts have.

#[cfg(test)]
mod tests;

use super::stream::Always;
use crate::cuda::{Queue, Rows, dim};
use crate::linear::cuda::wide::LINE;
use device::cuda::{CudaError, DeviceSlice, Launch, Parameters, Swizzle, TensorMap};

const OP: &str = "experts";
/// Kernels that have more shared memory than the default.
pub(crate) const LARGE: &[&str] = &[Kind::Laid.kernel(), Kind::Gathered.kernel()];

/// A kernel with its tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// 192 lines by 256 rows, which are laid by sorted pair before.
    Laid,
    /// 256 lines by 200 rows, which are gathered where they lie.
    Gathered,
}

impl Kind {
    const fn kernel(self) -> &'static str {
        match self {
            Self::Laid => "experts_many",
            Self::Gathered => "experts_gathered",
        }
    }

    /// Rows of a tile, at most.
    pub(super) const fn rows(self) -> usize {
        match self {
            Self::Laid => 256,
            Self::Gathered => 200,
        }
    }

    /// Lines of weights of a box.
    const fn lines(self) -> usize {
        match self {
            Self::Laid => 192,
            Self::Gathered => 128,
        }
    }

    /// Rows of a box.
    const fn row_box(self) -> usize {
        match self {
            Self::Laid => 32,
            Self::Gathered => 16,
        }
    }

    /// Bytes of stages, and what a block has beside them: barriers and units, where rows are gathered
    /// a u16 for every row of a tile.
    const fn shared(self) -> usize {
        let rows = self.rows().next_multiple_of(self.row_box());
        match self {
            Self::Laid => 4 * (self.lines() + rows) * 2 * LINE + 512,
            Self::Gathered => (5 * rows + 6 * self.lines()) * 2 * LINE + 16 * 18 + 2 * rows,
        }
    }
}

/// Threads of a block of either.
const THREADS: u32 = 512;
/// Fewest rows of a full tile.
const LEAST_ROWS: usize = 200;
/// Rows of a step, at most, where they are gathered: their numbers have sixteen bits.
const MOST_GATHERED: usize = 1 << 16;
/// Tokens of an expert, if all were equally busy, up to which gathering is faster.
const MOST_EACH_GATHERED: usize = 128;
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
    w_slab: TensorMap,
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
    x: u64,
    row_of: u64,
    width: u32,
    rows: u32,
    always: u32,
    pad: [u32; 17],
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `results`.
unsafe impl Parameters for Params {}

/// Operands; lengths are checked by the caller.
#[derive(Clone, Copy)]
pub(super) struct Products<'a> {
    pub(super) kind: Kind,
    /// `[rows, hidden]`; read where experts join or rows are gathered.
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
    /// `[max_pairs]` of u32: the row of every sorted pair; read where rows are gathered.
    pub(super) row_of: &'a DeviceSlice,
    /// `[max_pairs, intermediate]`.
    pub(super) inner: &'a DeviceSlice,
    /// `[max_pairs, hidden]`: the result; where rows are laid, these before.
    pub(super) y: &'a DeviceSlice,
    pub(super) joined: Option<Joined<'a>>,
}

/// Bytes of the counters of a step of `rows` rows: the units fetched, and one for every tile.
pub(super) const fn progress(rows: usize, pairs: usize, held: usize) -> usize {
    4 * (1 + rows.div_ceil(LEAST_ROWS) + held + pairs / LEAST_ROWS)
}

/// Whether the kernel takes experts of this width whose weights are on 16 bytes.
pub(super) const fn takes(hidden: usize, intermediate: usize) -> bool {
    hidden > 0 && intermediate > 0 && hidden.is_multiple_of(16) && intermediate.is_multiple_of(8)
}

/// Whether it is faster than two launches for so many tokens of an expert.
pub(super) const fn pays(each: usize) -> bool {
    each >= LEAST_EACH
}

/// The faster kernel for steps of `rows` rows with so many tokens of an expert.
pub(super) const fn kind(rows: usize, each: usize) -> Kind {
    if rows <= MOST_GATHERED && each <= MOST_EACH_GATHERED { Kind::Gathered } else { Kind::Laid }
}

/// Gate and up: `[batch, 2, n, inputs]`, boxes of `lines` lines of both.
fn up_map(
    w: &DeviceSlice,
    batch: usize,
    n: usize,
    inputs: usize,
    lines: usize,
) -> Result<TensorMap, CudaError> {
    let boxes = [LINE as u32, 8, 2, (lines / 16) as u32, 1];
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
    lines: usize,
) -> Result<TensorMap, CudaError> {
    let boxes = [LINE as u32, 2, 4, 2, (lines / 16) as u32];
    let k = inputs as u64;
    let dims = [k, 2, 4, 2, (batch * n / 16) as u64];
    TensorMap::bf16_strided(w, dims, [1, k, 4 * k, 2 * k, 16 * k], boxes, Swizzle::Bytes128)
}

fn rows_map(
    x: &DeviceSlice,
    rows: usize,
    inputs: usize,
    kind: Kind,
) -> Result<TensorMap, CudaError> {
    let boxes = [LINE as u32, kind.row_box() as u32];
    TensorMap::bf16(x, [inputs as u64, rows as u64], boxes, Swizzle::Bytes128)
}

/// Experts of one width.
struct Experts<'a> {
    kind: Kind,
    gate_up: &'a DeviceSlice,
    down: &'a DeviceSlice,
    batch: usize,
    hidden: usize,
    width: usize,
    x: &'a DeviceSlice,
    x_rows: usize,
    /// Of `inner` and `out`.
    rows: usize,
    inner: &'a DeviceSlice,
    out: &'a DeviceSlice,
    reused: bool,
}

impl Experts<'_> {
    /// Both products.
    fn products(&self) -> Result<[Product; 2], CudaError> {
        let Self { kind, gate_up, down, batch, hidden, width, x, x_rows, rows, inner, out, reused } =
            *self;
        let up = |lines| up_map(gate_up, batch, width, hidden, lines);
        let lines_of = |lines| down_map(down, batch, hidden, width, lines);
        let first = Product {
            w: up(kind.lines())?,
            w_slab: up(64)?,
            x: rows_map(x, x_rows, hidden, kind)?,
            out: inner.address(),
            out_stride: width as u64,
            lines: dim(OP, 2 * width)?,
            steps: dim(OP, hidden.div_ceil(LINE))?,
            expert: 1,
            reused: u32::from(reused),
            pad: [0; 24],
        };
        let second = Product {
            w: lines_of(kind.lines())?,
            w_slab: lines_of(64)?,
            x: rows_map(inner, rows, width, kind)?,
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
    let Products { kind, held, hidden, intermediate, max_pairs, y, inner, .. } = *p;
    let (x, x_rows) = match kind {
        Kind::Laid => (y, max_pairs),
        Kind::Gathered => (p.x, rows.padded),
    };
    let chosen = Experts {
        kind,
        gate_up: p.gate_up,
        down: p.down,
        batch: held,
        hidden,
        width: intermediate,
        x,
        x_rows,
        rows: max_pairs,
        inner,
        out: y,
        reused: max_pairs / held.max(1) > kind.rows(),
    };
    let [up, down] = chosen.products()?;
    let [always_up, always_down] = match &p.joined {
        Some(Joined { always, inner, out }) => Experts {
            kind,
            gate_up: always.gate_up,
            down: always.down,
            batch: 1,
            hidden,
            width: always.width,
            x: p.x,
            x_rows: rows.padded,
            rows: rows.padded,
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
        x: p.x.address(),
        row_of: p.row_of.address(),
        width: dim(OP, hidden)?,
        rows: dim(OP, rows.padded)?,
        always: u32::from(p.joined.is_some()),
        pad: [0; 17],
    };
    // As many as run at once; one that finds no unit ends.
    let blocks = dim(OP, on.multiprocessors())?;
    Launch::new(on.kernel(kind.kernel())?, [blocks, 1, 1], THREADS)
        .shared(kind.shared() as u32)
        .dependent()
        .on(on.stream, &params)
}
