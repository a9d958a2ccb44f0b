//! Attention over the paged cache on the device: the core of the grouped-query and the latent form.
//!
//! A line is a query row of one head; lines that share keys are cut into tiles, and keys into splits
//! whose partial results are merged by their maxima and masses. Segments, lengths and tables are read
//! on the device; the host says how many tiles and splits there can be. Block tables hold offsets of
//! whole 16 bytes. Invariant: what one segment's cache holds reaches no other segment.

pub mod cut;
pub mod prompt;
#[cfg(test)]
mod tests;

use crate::cuda::{Dtype, Queue, Rows, Tensor, bytes, dim, need, shape};
use crate::paged::{BLOCK, KvLayer};
use device::cuda::{Arena, CudaError, DeviceSlice, Launch, Parameters};

/// Kernels that may have more shared memory than the default.
pub(crate) const ALL: &[&str] = &[
    "attention_any_f32",
    "attention_any_bf16",
    "attention_mma_16_64",
    "attention_mma_16_128",
    "attention_mma_16_256",
    "attention_mma_16_512",
    "attention_mma_64_128",
    "attention_mma_64_256",
    "attention_mma_32_512",
];

/// Consecutive rows of one sequence, as the device has it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First row in the batch.
    pub start: u32,
    /// Rows.
    pub len: u32,
    /// Tokens with KV once this step's rows are written, the rows included.
    pub context: u32,
    /// Index among the table entries of its first block.
    pub table: u32,
}

/// Lines that one block computes, as the device has it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Which segment.
    pub segment: u32,
    /// First line of the segment.
    pub line: u32,
}

/// How attention is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// Any widths, f32 or bf16, ordinary arithmetic.
    Any,
    /// Tensor cores, 16 lines to a tile: decoding.
    Few,
    /// Tensor cores, 32 or 64 lines to a tile: prompts.
    Many,
}

/// What an attention looks like to the core.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Shape {
    pub(crate) dtype: Dtype,
    /// Query heads, and those that share a KV head.
    pub(crate) heads: usize,
    pub(crate) group: usize,
    /// Width of a query that comes from the first and from the second tensor.
    pub(crate) q_width: usize,
    pub(crate) rest_width: usize,
    pub(crate) v_width: usize,
    /// From one KV head to the next, in a cache row.
    pub(crate) key_stride: usize,
    /// From the row's start to the values; 0 where they lie inside keys.
    pub(crate) value_offset: usize,
    pub(crate) value_stride: usize,
    pub(crate) window: Option<usize>,
    pub(crate) scale: f32,
}

impl Shape {
    const fn key_width(&self) -> usize {
        self.q_width + self.rest_width
    }

    const fn kv_heads(&self) -> usize {
        self.heads / self.group
    }

    /// The variant for steps with or without prompt chunks.
    pub(crate) fn select(&self, layer: KvLayer, prompts: bool) -> Variant {
        let widths = [self.q_width, self.rest_width, self.v_width];
        let strides = [layer.row, layer.offset, self.key_stride, self.value_offset];
        let fits = self.dtype == Dtype::Bf16
            && widths.iter().all(|n| n.is_multiple_of(16))
            && strides.iter().all(|n| n.is_multiple_of(8))
            && self.v_width <= 512
            && self.key_width() <= 576;
        match (fits, prompts) {
            (false, _) => Variant::Any,
            (true, false) => Variant::Few,
            (true, true) => Variant::Many,
        }
    }

    /// Kernel, lines of a tile, threads, bytes of shared memory.
    fn kernel(&self, variant: Variant) -> (&'static str, usize, u32, usize) {
        let (name, lines, threads) = match (variant, self.v_width) {
            (Variant::Any, _) => {
                let name = self.dtype.pick("attention_any_f32", "attention_any_bf16");
                const LINES: usize = 4;
                let shared = LINES * (self.key_width() + self.v_width) * 4;
                return (name, LINES, 128, shared);
            }
            (Variant::Few, ..=64) => ("attention_mma_16_64", 16, 128),
            (Variant::Few, ..=128) => ("attention_mma_16_128", 16, 128),
            (Variant::Few, ..=256) => ("attention_mma_16_256", 16, 128),
            (Variant::Few, _) => ("attention_mma_16_512", 16, 128),
            (Variant::Many, ..=128) if self.key_width() <= 256 => ("attention_mma_64_128", 64, 256),
            (Variant::Many, ..=256) if self.key_width() <= 256 => ("attention_mma_64_256", 64, 256),
            (Variant::Many, _) => ("attention_mma_32_512", 32, 256),
        };
        // As the kernel lays it out: queries, two stages of keys and values, scores, weights, and
        // three numbers a line.
        const PAD: usize = 8;
        let key = self.key_width() + PAD;
        let value = if self.value_offset == 0 { 0 } else { self.v_width + PAD };
        let stages = 2 * BLOCK * (key + value) * 2;
        let lined = lines * (key * 2 + (BLOCK + 4) * 4 + (BLOCK + PAD) * 2 + 3 * 4);
        (name, lines, threads, stages + lined)
    }

    /// Lines of a tile of a variant.
    pub(crate) fn tile_lines(&self, variant: Variant) -> usize {
        self.kernel(variant).1
    }
}

/// Tiles of segments: `group` lines a row, `lines` to a tile. Into `out`, which is cleared.
pub fn tiles(segments: &[Segment], group: usize, lines: usize, out: &mut Vec<Tile>) {
    out.clear();
    for (segment, of) in (0_u32..).zip(segments) {
        let all = of.len as usize * group;
        out.extend((0..all).step_by(lines).map(|line| Tile { segment, line: line as u32 }));
    }
}

/// Tiles that batches of up to `rows` rows in up to `segments` segments have at most.
#[must_use]
pub const fn max_tiles(rows: usize, segments: usize, group: usize, lines: usize) -> usize {
    // A segment's last tile is the only one that is not full.
    let full = rows * group / lines;
    let started = if segments < rows { segments } else { rows };
    full + started
}

/// Splits that keep all multiprocessors busy; each has at least two blocks at the longest context.
#[must_use]
pub fn splits(multiprocessors: usize, tiles: usize, kv_heads: usize, max_context: usize) -> usize {
    const MAX: usize = 64;
    let wanted = (2 * multiprocessors).div_ceil((tiles * kv_heads).max(1));
    wanted.min(max_context.div_ceil(2 * BLOCK)).clamp(1, MAX)
}

/// A step's segments on the device, and how its grid is cut.
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    /// [`Segment`] each.
    pub segments: &'a DeviceSlice,
    /// [`Tile`] each, for the variant.
    pub tiles: &'a DeviceSlice,
    /// One u32: how many tiles are real.
    pub tile_count: &'a DeviceSlice,
    /// Tiles that the grid covers.
    pub max_tiles: usize,
    /// u64: element offsets of blocks.
    pub tables: &'a DeviceSlice,
    /// Stretches that keys are cut into.
    pub splits: usize,
    /// Which kernels.
    pub variant: Variant,
}

/// Partial results of splits.
#[derive(Clone, Debug)]
pub struct Partials {
    sums: DeviceSlice,
    masses: DeviceSlice,
}

impl Partials {
    /// Bytes of device memory for `lines` lines (rows times heads times splits).
    #[must_use]
    pub const fn bytes(lines: usize, v_width: usize) -> usize {
        Arena::padded(lines * v_width * 4) + Arena::padded(lines * 8)
    }

    /// Cuts them from an arena.
    ///
    /// # Errors
    /// When the arena is used up.
    pub fn take(arena: &mut Arena, lines: usize, v_width: usize) -> Result<Self, CudaError> {
        const OP: &str = "partial attention";
        Ok(Self {
            sums: arena.take(OP, bytes(OP, &[lines, v_width, 4])?)?,
            masses: arena.take(OP, bytes(OP, &[lines, 8])?)?,
        })
    }
}

/// Mirrors `AttentionParams`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    q: u64,
    q_rest: u64,
    arena: u64,
    out: u64,
    partial: u64,
    partial_lse: u64,
    segments: u64,
    tiles: u64,
    tile_count: u64,
    tables: u64,
    arena_elements: u64,
    layer_offset: u64,
    q_row: u64,
    q_head: u64,
    rest_row: u64,
    rest_head: u64,
    rows: u32,
    heads: u32,
    group: u32,
    q_width: u32,
    rest_width: u32,
    v_width: u32,
    kv_row: u32,
    key_stride: u32,
    value_offset: u32,
    value_stride: u32,
    splits: u32,
    window: u32,
    scale: f32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `attention`, table entries by the kernel.
unsafe impl Parameters for Params {}

/// Mirrors `MergeParams`.
#[repr(C)]
#[derive(Clone, Copy)]
struct MergeParams {
    partial: u64,
    partial_lse: u64,
    out: u64,
    count: u64,
    rows: u32,
    heads: u32,
    v_width: u32,
    splits: u32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `attention`.
unsafe impl Parameters for MergeParams {}

/// Part of every query, with strides in elements.
#[derive(Clone, Copy, Debug)]
pub struct Query {
    /// Of the first row's first head.
    pub address: u64,
    /// From row to row.
    pub row: usize,
    /// From head to head.
    pub head: usize,
}

/// `out` is `[rows, heads * v_width]`; the caller checked the queries.
#[allow(clippy::too_many_arguments, reason = "the operands of attention")]
pub(crate) fn attention(
    on: Queue<'_>,
    rows: Rows<'_>,
    shape_: &Shape,
    [q, rest]: [Query; 2],
    layer: KvLayer,
    arena: Tensor<'_>,
    plan: &Plan<'_>,
    partials: &Partials,
    out: &DeviceSlice,
) -> Result<(), CudaError> {
    const OP: &str = "attention";
    let Shape { dtype, heads, group, v_width, .. } = *shape_;
    let Plan { splits, max_tiles, variant, .. } = *plan;
    let (name, _, threads, shared) = shape_.kernel(variant);
    let fits = shape_.select(layer, variant == Variant::Many);
    let limit = on.gpu.facts().shared_bytes as usize;
    if (variant != Variant::Any && fits != variant) || arena.dtype != dtype || shared > limit {
        return Err(shape(OP, format!("{shape_:?} at {layer:?} as {variant:?}")));
    }
    need(OP, "out", out, &[rows.padded, heads, v_width], dtype.size())?;
    need(OP, "tiles", plan.tiles, &[max_tiles], size_of::<Tile>())?;
    if splits > 1 {
        need(OP, "partial sums", &partials.sums, &[rows.padded, heads, splits, v_width], 4)?;
        need(OP, "partial masses", &partials.masses, &[rows.padded, heads, splits], 8)?;
    }
    let params = Params {
        q: q.address,
        q_rest: rest.address,
        arena: arena.address(),
        out: out.address(),
        partial: partials.sums.address(),
        partial_lse: partials.masses.address(),
        segments: plan.segments.address(),
        tiles: plan.tiles.address(),
        tile_count: plan.tile_count.address(),
        tables: plan.tables.address(),
        arena_elements: arena.len() as u64,
        layer_offset: layer.offset as u64,
        q_row: q.row as u64,
        q_head: q.head as u64,
        rest_row: rest.row as u64,
        rest_head: rest.head as u64,
        rows: dim(OP, rows.padded)?,
        heads: dim(OP, heads)?,
        group: dim(OP, group)?,
        q_width: dim(OP, shape_.q_width)?,
        rest_width: dim(OP, shape_.rest_width)?,
        v_width: dim(OP, v_width)?,
        kv_row: dim(OP, layer.row)?,
        key_stride: dim(OP, shape_.key_stride)?,
        value_offset: dim(OP, shape_.value_offset)?,
        value_stride: dim(OP, shape_.value_stride)?,
        splits: dim(OP, splits)?,
        window: dim(OP, shape_.window.unwrap_or(0))?,
        scale: shape_.scale,
    };
    let grid = [dim(OP, max_tiles)?, dim(OP, shape_.kv_heads())?, params.splits];
    let shared = dim(OP, shared)?;
    Launch::new(on.kernel(name)?, grid, threads).shared(shared).on(on.stream, &params)?;
    if splits == 1 {
        return Ok(());
    }
    let merge = MergeParams {
        partial: params.partial,
        partial_lse: params.partial_lse,
        out: params.out,
        count: rows.count_address(),
        rows: params.rows,
        heads: params.heads,
        v_width: params.v_width,
        splits: params.splits,
    };
    let kernel = on.kernel(dtype.pick("merge_splits_f32", "merge_splits_bf16"))?;
    Launch::new(kernel, [merge.rows, merge.heads, 1], 128).on(on.stream, &merge)
}
