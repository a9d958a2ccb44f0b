//! The expanded form for prompts whose sequence began in earlier steps, or behind a shared prefix.
//!
//! Latents of a whole sequence, the step's own rows included, are gathered from the cache, projected up,
//! and attended to like those of a whole prompt. As many sequences at once as fit the memory for it, which
//! is a pass; of a sequence that does not fit, some heads at a time. Launches depend on how many passes
//! there are and on what their tokens are padded to; which sequences they are of is read on the device, so
//! that a step can be captured. Invariant: no key is read that was not projected for its row.

#[cfg(test)]
mod tests;

use super::{OP, Room, Scratch, cut, serves};
use crate::cuda::{Dtype, Queue, Rows, Strided, Tensor, dim, need, shape};
use crate::flash::cuda::prompt::{self, Keys};
use crate::flash::cuda::{Segment, Tile};
use crate::linear::cuda::{Linear, linear};
use crate::mla::Mla;
use crate::paged::KvLayer;
use core::ops::Range;
use device::cuda::{CudaError, DeviceSlice, Launch, Parameters};

const GATHER: &str = "mla_gather";
const THREADS: u32 = 288;
/// Rows of a block of threads.
const ROWS: usize = 16;
/// Fewest rows that are worth the projection of a context. In operations the forms meet at 171 rows behind
/// a long one; but what runs absorbed takes tiles that reach 36 TFLOP/s at best. Measured, 16 heads, in
/// microseconds absorbed and expanded: 16 rows of 1,024 keys 55, 43; 16 of 8,192 144, 216; 32 of 8,192 197,
/// 216; 64 of 8,192 385, 192.
const LEAST: u32 = 32;
/// Tokens that passes are padded to at least: their products take less than launches do.
const FEW: usize = 1024;

/// Whether a segment is computed here.
#[must_use]
pub const fn is_later(segment: &Segment) -> bool {
    segment.context > segment.len && segment.len >= LEAST
}

/// Rows that a pass of `tokens` is padded to: few numbers, for which the way to compute their products is
/// planned once and steps are captured. Tokens whose heads all fit are padded to no more than do.
fn padded(tokens: usize, room: Room) -> usize {
    let fit = room.latents.min(room.expanded);
    let most = if tokens <= fit { fit } else { room.latents };
    let power = tokens.next_power_of_two().max(FEW);
    let middle = power / 4 * 3;
    let bucket = if power > FEW && tokens <= middle { middle } else { power };
    bucket.min(most)
}

/// All that passes may be padded to, from few to many.
#[must_use]
pub fn paddings(room: Room) -> Vec<usize> {
    let next = |last: &usize| (*last < room.latents).then(|| padded(last + 1, room));
    std::iter::successors(Some(padded(1, room)), next).collect()
}

/// Sequences that are gathered and projected together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pass {
    /// Of [`Passes::segments`].
    pub segments: Range<usize>,
    /// Of [`Passes::tiles`].
    pub tiles: Range<usize>,
    /// Tokens of all sequences.
    pub tokens: usize,
    /// What they are padded to.
    pub padded: usize,
}

impl Pass {
    /// As the device reads it, [`PASS_WORDS`] words.
    #[must_use]
    pub const fn words(&self) -> [u32; PASS_WORDS] {
        let Self { segments, tiles, .. } = self;
        let of_tiles = [tiles.start as u32, (tiles.end - tiles.start) as u32];
        [segments.start as u32, segments.end as u32, of_tiles[0], of_tiles[1]]
    }
}

/// Words of a pass: its first segment, the one behind its last, its first tile, how many tiles.
pub const PASS_WORDS: usize = 4;

/// A step's passes as the device wants them; made anew for every step, in memory made once.
#[derive(Clone, Debug, Default)]
pub struct Passes {
    /// One after the other.
    pub passes: Vec<Pass>,
    /// `table` is the first row among those gathered.
    pub segments: Vec<Segment>,
    /// Of each, its first block among the tables.
    pub firsts: Vec<u32>,
    /// Of every pass; `segment` is one of all.
    pub tiles: Vec<Tile>,
    /// Of a pass.
    some: Vec<Tile>,
}

impl Passes {
    /// With room for steps of up to `rows` rows in up to `segments` segments.
    #[must_use]
    pub fn with_capacity(rows: usize, segments: usize) -> Self {
        let tiles = cut().max_tiles(rows, segments);
        Self {
            passes: Vec::with_capacity(segments),
            segments: Vec::with_capacity(segments),
            firsts: Vec::with_capacity(segments),
            tiles: Vec::with_capacity(tiles),
            some: Vec::with_capacity(tiles),
        }
    }

    /// Those of a step's segments.
    pub fn make(&mut self, all: &[Segment], room: Room) {
        self.clear();
        let most = room.latents.min(room.expanded);
        for of in all.iter().filter(|of| is_later(of)) {
            let (context, at) = (of.context as usize, self.segments.len());
            let open = self.passes.last_mut().filter(|pass| pass.tokens + context <= most);
            let row = match open {
                Some(pass) => {
                    pass.segments.end = at + 1;
                    pass.tokens += context;
                    pass.tokens - context
                }
                None => {
                    let segments = at..at + 1;
                    self.passes.push(Pass { segments, tiles: 0..0, tokens: context, padded: 0 });
                    0
                }
            };
            self.segments.push(Segment { table: row as u32, ..*of });
            self.firsts.push(of.table);
        }
        for pass in &mut self.passes {
            let begin = self.tiles.len();
            cut().tiles(&self.segments[pass.segments.clone()], |_| true, &mut self.some);
            let first = pass.segments.start as u32;
            let of_all = |tile: &Tile| Tile { segment: first + tile.segment, ..*tile };
            self.tiles.extend(self.some.iter().map(of_all));
            pass.tiles = begin..self.tiles.len();
            pass.padded = padded(pass.tokens, room);
        }
    }

    /// Without any.
    pub fn clear(&mut self) {
        self.passes.clear();
        self.segments.clear();
        self.firsts.clear();
        self.tiles.clear();
    }
}

/// A pass on the device.
#[derive(Clone, Copy, Debug)]
pub struct Later<'a> {
    /// What its tokens are padded to.
    pub tokens: usize,
    /// By [`Pass::words`].
    pub parts: &'a DeviceSlice,
    /// [`Passes::segments`].
    pub segments: &'a DeviceSlice,
    /// [`Passes::firsts`].
    pub firsts: &'a DeviceSlice,
    /// [`Passes::tiles`].
    pub tiles: &'a DeviceSlice,
    /// u64: element offsets of blocks.
    pub tables: &'a DeviceSlice,
}

/// Mirrors `mla_latents::Params`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    arena: u64,
    out: u64,
    pass: u64,
    segments: u64,
    firsts: u64,
    tables: u64,
    arena_elements: u64,
    layer_offset: u64,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `attention`, table entries by the kernel.
unsafe impl Parameters for Params {}

/// As [`super::attention`] for a pass; the rows' own latents are in the cache already.
///
/// # Errors
/// When widths are others, an operand is too short, or a launch fails.
#[allow(clippy::too_many_arguments, reason = "the operands of attention")]
pub fn attention(
    on: Queue<'_>,
    rows: usize,
    mla: &Mla,
    q: Strided<'_>,
    kv_b: &DeviceSlice,
    (layer, arena): (KvLayer, Tensor<'_>),
    later: &Later<'_>,
    scratch: &Scratch,
    out: &DeviceSlice,
) -> Result<(), CudaError> {
    let Mla { heads, nope, rope, v, latent, .. } = *mla;
    let (row, up, tokens) = (latent + rope, nope + v, later.tokens);
    if !serves(mla, arena.dtype) || layer.row != row || fit(mla, scratch, tokens) == 0 {
        return Err(shape(OP, format!("{mla:?} over {layer:?} for {tokens} tokens")));
    }
    q.need(OP, "q", rows, &[heads, nope + rope], 2)?;
    need(OP, "kv_b", kv_b, &[heads, up, latent], 2)?;
    need(OP, "latents", &scratch.latents, &[tokens, row], 2)?;
    need(OP, "out", out, &[rows, heads, v], 2)?;
    need(OP, "pass", later.parts, &[PASS_WORDS], 4)?;
    let segments = later.segments.bytes() / size_of::<Segment>();
    need(OP, "segments", later.segments, &[segments.max(1)], size_of::<Segment>())?;
    need(OP, "first blocks", later.firsts, &[segments], 4)?;
    let params = Params {
        arena: arena.address(),
        out: scratch.latents.address(),
        pass: later.parts.address(),
        segments: later.segments.address(),
        firsts: later.firsts.address(),
        tables: later.tables.address(),
        arena_elements: arena.len() as u64,
        layer_offset: layer.offset as u64,
    };
    let grid = [dim(OP, tokens.div_ceil(ROWS))?, 1, 1];
    Launch::new(on.kernel(GATHER)?, grid, THREADS).dependent().on(on.stream, &params)?;
    let [first_tile, tile_count] = [8..12, 12..16].map(|range| later.parts.slice(range));
    let plan = prompt::Plan {
        segments: later.segments,
        tiles: later.tiles,
        tile_count: &tile_count,
        first_tile: Some(&first_tile),
        max_tiles: later.tiles.bytes() / size_of::<Tile>(),
    };
    by_heads(on, mla, kv_b, scratch, tokens, |of| {
        let keys = Keys::Rows {
            up: &scratch.expanded,
            shared: Strided::dense(&scratch.latents, row),
            width: row,
            rows: tokens,
        };
        let of_heads = q.slice.slice(of.start * (nope + rope) * 2..q.slice.bytes());
        let operands = prompt::Operands {
            rows,
            heads,
            kv_heads: of.len(),
            group: 1,
            qk: nope + rope,
            scale: mla.scale,
            q: Strided { slice: &of_heads, ..q },
            keys,
            out: &out.slice(of.start * v * 2..rows * heads * v * 2),
        };
        prompt::attention(on, &operands, &plan)
    })
}

/// Makes products of `tokens` known: the way to compute some is timed when they are first enqueued.
///
/// # Errors
/// When there is no room for so many, or a launch fails.
pub fn plan(
    on: Queue<'_>,
    mla: &Mla,
    kv_b: &DeviceSlice,
    scratch: &Scratch,
    tokens: usize,
) -> Result<(), CudaError> {
    by_heads(on, mla, kv_b, scratch, tokens, |_| Ok(()))
}

/// Heads whose keys and values fit for `tokens`, at most all.
fn fit(mla: &Mla, scratch: &Scratch, tokens: usize) -> usize {
    let of_head = tokens * (mla.nope + mla.v) * 2;
    scratch.expanded.bytes().checked_div(of_head).unwrap_or(0).min(mla.heads)
}

/// Projects the gathered latents up for as many heads at a time as fit, and calls `then` with each.
fn by_heads(
    on: Queue<'_>,
    mla: &Mla,
    kv_b: &DeviceSlice,
    scratch: &Scratch,
    tokens: usize,
    then: impl Fn(Range<usize>) -> Result<(), CudaError>,
) -> Result<(), CudaError> {
    let Mla { heads, nope, rope, v, latent, .. } = *mla;
    let up = nope + v;
    let tensor = |slice| Tensor::new(slice, Dtype::Bf16);
    for first in (0..heads).step_by(fit(mla, scratch, tokens).max(1)) {
        let here = first..heads.min(first + fit(mla, scratch, tokens));
        let weights = kv_b.slice(here.start * up * latent * 2..here.end * up * latent * 2);
        let (from, to) = (tensor(&scratch.latents), tensor(&scratch.expanded));
        // What pads tokens is whatever was gathered before, and nothing reads what comes of it.
        let plain = Linear::plain(from, &weights, to, latent, here.len() * up);
        linear(on, Rows::exactly(tokens), &Linear { x_stride: latent + rope, ..plain })?;
        then(here)?;
    }
    Ok(())
}
