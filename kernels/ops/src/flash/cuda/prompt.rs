//! Attention of prompts: segments of several rows, every row over all keys of its sequence up to its
//! own, in one kernel of warpgroups (`prompt.cuh`).
//!
//! Keys lie in the cache, or row after row in memory of the step. Heads are 128 or 64 wide, or 192 with
//! values of 128; bf16; no windows. Tiles are handed out one by one, the longest first; where they are few,
//! blocks share the keys of each. Other rows of `out` are left alone. Invariant: what one segment's keys hold
//! reaches no other segment.

#[cfg(test)]
mod tests;

use super::{Segment, Tile, max_tiles as most_tiles, tiles as all_tiles};
use crate::cuda::{Queue, Strided, dim, need, shape};
use crate::paged::{BLOCK, KvLayer};
use device::cuda::{
    Context, CudaError, DeviceMemory, DeviceSlice, Launch, Parameters, Stream, Swizzle, TensorMap,
};

const OP: &str = "prompt attention";
/// Keys of a step.
const KEYS: usize = 128;
/// Elements of a line as the copy engine swizzles it; blocks of the cache begin on multiples.
pub(crate) const LINE: usize = 64;

const PAGED_128: &str = "gqa_prompt_128";
const PAGED_64: &str = "gqa_prompt_64";
const ROWS_192: &str = "mla_prompt";
/// Kernels that have more shared memory than the default.
pub(crate) const ALL: [&str; 3] = [PAGED_128, PAGED_64, ROWS_192];

/// How query lines are cut into tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    group: usize,
    rows: usize,
    warpgroups: usize,
}

impl Cut {
    /// For `group` heads that share keys of `width`; `None` where no kernel serves them.
    #[must_use]
    pub const fn new(group: usize, width: usize) -> Option<Self> {
        let warpgroups = match width {
            64 => 3,
            128 | 192 => 2,
            _ => return None,
        };
        if group == 0 || group > 128 {
            return None;
        }
        Some(Self { group, rows: 64 * warpgroups / group, warpgroups })
    }

    /// Lines of a tile: whole rows.
    const fn lines(self) -> usize {
        self.rows * self.group
    }

    /// A warpgroup that copies, and those that compute.
    const fn threads(self) -> u32 {
        128 * (self.warpgroups as u32 + 1)
    }

    /// Shared memory of a block in bytes: queries, two stages of keys and values, what is known of a
    /// tile, barriers.
    const fn shared(self, qk: usize, v: usize) -> u32 {
        let elements = 64 * self.warpgroups * qk + 2 * KEYS * (qk + v);
        (elements * 2 + 256) as u32
    }

    /// Tiles of the segments that `serves` says, the longest first. Into `out`, which is cleared.
    pub fn tiles(
        self,
        segments: &[Segment],
        serves: impl Fn(&Segment) -> bool,
        out: &mut Vec<Tile>,
    ) {
        all_tiles(segments, self.group, self.lines(), out);
        out.retain(|tile| serves(&segments[tile.segment as usize]));
        out.sort_unstable_by_key(|tile| {
            let of = &segments[tile.segment as usize];
            let end = (tile.line as usize / self.group + self.rows).min(of.len as usize);
            let keys = (of.context - of.len) as usize + end;
            (core::cmp::Reverse(keys.div_ceil(KEYS)), tile.segment, tile.line)
        });
    }

    /// Tiles that batches of up to `rows` rows in up to `segments` segments have at most.
    #[must_use]
    pub const fn max_tiles(self, rows: usize, segments: usize) -> usize {
        most_tiles(rows, segments, self.group, self.lines())
    }
}

/// What blocks of a launch share; launches run one after the other.
#[derive(Debug)]
pub(crate) struct Shared {
    /// A u32: the next tile. One for each warpgroup of every part of a tile: how many are done. Zero
    /// between launches.
    counts: DeviceSlice,
    /// What the threads of a part hold.
    partial: DeviceSlice,
}

impl Shared {
    /// Of a block that computes, at most: its two warpgroups of lines of 128 values, or three of 64.
    const PARTIAL: usize = 2 * 128 * (128 / 2 + 4) * 4;
    const MOST_WARPGROUPS: usize = 3;

    /// Bytes of device memory.
    pub(crate) const fn bytes(multiprocessors: usize) -> usize {
        Self::count_bytes(multiprocessors) + multiprocessors * Self::PARTIAL
    }

    const fn count_bytes(multiprocessors: usize) -> usize {
        4 * (1 + multiprocessors * Self::MOST_WARPGROUPS)
    }

    /// With counts of zero.
    pub(crate) fn new(context: &Context) -> Result<Self, CudaError> {
        let blocks = context.facts().multiprocessors as usize;
        let bytes = Self::count_bytes(blocks);
        let counts = DeviceMemory::allocate(context, "counts of tiles", bytes)?;
        let bytes = blocks * Self::PARTIAL;
        let partial = DeviceMemory::allocate(context, "parts of prompt attention", bytes)?;
        let stream = Stream::new(context)?;
        stream.fill(&counts, 0)?;
        stream.synchronize()?;
        Ok(Self { counts, partial })
    }
}

/// A step's prompts on the device.
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    /// [`Segment`] each. Where keys lie in rows, `table` is the first one's row.
    pub segments: &'a DeviceSlice,
    /// By [`Cut::tiles`].
    pub tiles: &'a DeviceSlice,
    /// One u32: how many there are.
    pub tile_count: &'a DeviceSlice,
    /// One u32: which of them is the first; `None` where it is that at the beginning.
    pub first_tile: Option<&'a DeviceSlice>,
    /// How many there can be.
    pub max_tiles: usize,
}

/// Where keys and values lie.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Keys<'a> {
    /// In blocks of the cache: keys of all KV heads, then values, as wide as keys.
    Paged { arena: &'a DeviceSlice, layer: KvLayer, tables: &'a DeviceSlice },
    /// `[rows, heads, 256]`: 128 of the key, then the value; the key's other 64, which all heads share,
    /// end the `width` elements of rows of `shared`.
    Rows { up: &'a DeviceSlice, shared: Strided<'a>, width: usize, rows: usize },
}

/// What attention works on; `q` is `[rows, heads, qk]`, its rows as far apart as it says, `out`
/// `[rows, heads, v]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operands<'a> {
    pub(crate) rows: usize,
    /// From row to row.
    pub(crate) heads: usize,
    /// Computed here: so many KV heads of so many heads each, from where `q` and `out` begin.
    pub(crate) kv_heads: usize,
    pub(crate) group: usize,
    pub(crate) qk: usize,
    pub(crate) scale: f32,
    pub(crate) q: Strided<'a>,
    pub(crate) keys: Keys<'a>,
    pub(crate) out: &'a DeviceSlice,
}

/// Mirrors `prompt::Params`.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Params {
    q: TensorMap,
    keys: TensorMap,
    shared: TensorMap,
    out: u64,
    segments: u64,
    tiles: u64,
    tile_count: u64,
    first_tile: u64,
    tables: u64,
    ticket: u64,
    arrived: u64,
    partial: u64,
    arena_elements: u64,
    layer_offset: u64,
    block_elements: u64,
    heads: u32,
    kv_heads: u32,
    group: u32,
    key_lines: u32,
    value_line: u32,
    shared_line: u32,
    scale: f32,
    pad: u32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `attention`, table entries by the kernel.
unsafe impl Parameters for Params {}

/// Enqueues it.
///
/// # Errors
/// When widths are others, an operand is too short, or the launch fails.
pub(crate) fn attention(
    on: Queue<'_>,
    operands: &Operands<'_>,
    plan: &Plan<'_>,
) -> Result<(), CudaError> {
    let Operands { rows, heads, kv_heads, group, qk, scale, q, keys, out } = *operands;
    let refused = || shape(OP, format!("{operands:?}"));
    let cut = Cut::new(group, qk).ok_or_else(refused)?;
    let here = kv_heads * group;
    if here == 0 || here > heads || rows == 0 {
        return Err(refused());
    }
    let (kernel, v) = match (&keys, qk) {
        (Keys::Paged { .. }, 128) => (PAGED_128, 128),
        (Keys::Paged { .. }, 64) => (PAGED_64, 64),
        (Keys::Rows { .. }, 192) if group == 1 => (ROWS_192, 128),
        _ => return Err(refused()),
    };
    need(OP, "out", out, &[(rows - 1) * heads + here, v], 2)?;
    need(OP, "tiles", plan.tiles, &[plan.max_tiles], size_of::<Tile>())?;
    need(OP, "tile count", plan.tile_count, &[1], 4)?;
    plan.first_tile.map_or(Ok(()), |first| need(OP, "first tile", first, &[1], 4))?;
    q.need(OP, "q", rows, &[here, qk], 2)?;
    let [line, q_row, of_qk, of_here] = [LINE, q.stride, qk, here].map(|n| n as u64);
    let boxes = [LINE as u32, group as u32, cut.rows as u32, 1];
    let dims = [line, of_here, rows as u64, of_qk / line];
    let strides = [1, of_qk, q_row, line];
    let q = TensorMap::bf16_strided(q.slice, dims, strides, boxes, Swizzle::Bytes128)?;
    let of_blocks = on.prompts();
    let params = Params {
        q,
        keys: q,
        shared: q,
        out: out.address(),
        segments: plan.segments.address(),
        tiles: plan.tiles.address(),
        tile_count: plan.tile_count.address(),
        first_tile: plan.first_tile.map_or(0, DeviceSlice::address),
        tables: 0,
        ticket: of_blocks.counts.address(),
        arrived: of_blocks.counts.address() + 4,
        partial: of_blocks.partial.address(),
        arena_elements: 0,
        layer_offset: 0,
        block_elements: 0,
        heads: dim(OP, heads)?,
        kv_heads: dim(OP, kv_heads)?,
        group: dim(OP, group)?,
        key_lines: 0,
        value_line: 0,
        shared_line: 0,
        scale: scale * core::f32::consts::LOG2_E,
        pad: 0,
    };
    let params = match keys {
        Keys::Paged { arena, layer, tables } => {
            if layer.row != 2 * kv_heads * qk || !layer.offset.is_multiple_of(LINE) {
                return Err(refused());
            }
            let row = layer.row as u64;
            // A line anywhere in the cache and the same one of the 63 tokens behind it.
            let elements = (arena.bytes() / 2) as u64;
            let begins = (elements / line).checked_sub((BLOCK as u64 - 1) * (row / line));
            let begins = begins.filter(|n| *n > 0).ok_or_else(refused)?;
            let dims = [line, BLOCK as u64, begins];
            let boxes = [LINE as u32, BLOCK as u32, 1];
            let of = TensorMap::bf16_strided(arena, dims, [1, row, line], boxes, Swizzle::Bytes128);
            Params {
                keys: of?,
                tables: tables.address(),
                arena_elements: elements,
                layer_offset: layer.offset as u64,
                block_elements: BLOCK as u64 * row,
                key_lines: dim(OP, qk / LINE)?,
                value_line: dim(OP, kv_heads * qk / LINE)?,
                ..params
            }
        }
        Keys::Rows { up, shared, width, rows } => {
            const UP: u64 = 256;
            if !width.is_multiple_of(LINE) || rows == 0 {
                return Err(refused());
            }
            let (rows, width, stride) = (rows as u64, width as u64, shared.stride as u64);
            let boxes = [LINE as u32, KEYS as u32, 1];
            let dims = [line, rows, of_here * (UP / line)];
            let of = [1, of_here * UP, line];
            Params {
                keys: TensorMap::bf16_strided(up, dims, of, boxes, Swizzle::Bytes128)?,
                shared: TensorMap::bf16_strided(
                    shared.slice,
                    [line, rows, width / line],
                    [1, stride, line],
                    boxes,
                    Swizzle::Bytes128,
                )?,
                key_lines: dim(OP, UP as usize / LINE)?,
                value_line: 2,
                shared_line: dim(OP, width as usize / LINE - 1)?,
                ..params
            }
        }
    };
    // Where tiles are few, blocks share them.
    let blocks = on.multiprocessors();
    Launch::new(on.kernel(kernel)?, [dim(OP, blocks)?, 1, 1], cut.threads())
        .shared(cut.shared(qk, v))
        .dependent()
        .on(on.stream, &params)
}
