//! The expanded form for prompts whose sequence began in earlier steps, or behind a shared prefix.
//!
//! Latents of a whole sequence, the step's own rows included, are gathered from the cache, projected up,
//! and attended to like those of a whole prompt. As many sequences at once as fit the memory for it, which
//! is a pass; of a sequence that does not fit, some heads at a time. How many launches that takes depends
//! on the step, so these steps are not captured. Invariant: nothing is projected that no row reads.

#[cfg(test)]
mod tests;

use super::{OP, Room, Scratch, cut, serves};
use crate::cuda::{Dtype, Queue, Rows, Strided, Tensor, dim, need, shape};
use crate::flash::cuda::prompt::{self, Keys};
use crate::flash::cuda::{Segment, Tile};
use crate::linear::cuda::{Linear, linear};
use crate::mla::Mla;
use crate::paged::{BLOCK, KvLayer};
use core::ops::Range;
use device::cuda::{CudaError, DeviceSlice, Launch, Parameters};

const GATHER: &str = "mla_gather";
const THREADS: u32 = 256;
/// Fewest rows that are worth the projection of a context. In operations the forms meet at 171 rows behind
/// a long one; but what runs absorbed takes tiles that reach 36 TFLOP/s at best. Measured, 16 heads, in
/// microseconds absorbed and expanded: 16 rows of 1,024 keys 55, 43; 16 of 8,192 144, 216; 32 of 8,192 197,
/// 216; 64 of 8,192 385, 192.
const LEAST: u32 = 32;

/// Whether a segment is computed here.
#[must_use]
pub const fn is_later(segment: &Segment) -> bool {
    segment.context > segment.len && segment.len >= LEAST
}

/// Rows that products of `tokens` are padded to, up to `most`: few numbers, for which the way to compute
/// them is planned once.
fn padded(tokens: usize, most: usize) -> usize {
    let step = (tokens.next_power_of_two() / 8).max(1);
    tokens.next_multiple_of(step).min(most)
}

/// Sequences that are gathered and projected together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pass {
    /// Of [`Passes::segments`].
    pub segments: Range<usize>,
    /// Of [`Passes::tiles`].
    pub tiles: Range<usize>,
    /// Tokens of all sequences, and of the longest.
    pub tokens: usize,
    /// As said.
    pub longest: usize,
}

/// A step's passes as the device wants them; made anew for every step, in memory made once.
#[derive(Clone, Debug, Default)]
pub struct Passes {
    /// One after the other.
    pub passes: Vec<Pass>,
    /// `table` is the first row among those gathered.
    pub segments: Vec<Segment>,
    /// Of each, its first block among the tables.
    pub firsts: Vec<u32>,
    /// Of every pass; `segment` counts from the pass's first.
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
                    pass.longest = pass.longest.max(context);
                    pass.tokens += context;
                    pass.tokens - context
                }
                None => {
                    let segments = at..at + 1;
                    let pass = Pass { segments, tiles: 0..0, tokens: context, longest: context };
                    self.passes.push(pass);
                    0
                }
            };
            self.segments.push(Segment { table: row as u32, ..*of });
            self.firsts.push(of.table);
        }
        for pass in &mut self.passes {
            let begin = self.tiles.len();
            cut().tiles(&self.segments[pass.segments.clone()], |_| true, &mut self.some);
            self.tiles.extend_from_slice(&self.some);
            pass.tiles = begin..self.tiles.len();
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
    /// Which.
    pub pass: &'a Pass,
    /// Its segments and tiles.
    pub plan: prompt::Plan<'a>,
    /// u32 for each of its segments.
    pub firsts: &'a DeviceSlice,
    /// u64: element offsets of blocks.
    pub tables: &'a DeviceSlice,
}

/// Mirrors `mla_latents::Params`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    arena: u64,
    out: u64,
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
    let Mla { heads, nope, rope, v, latent, scale } = *mla;
    let Pass { segments, tokens, longest, .. } = later.pass;
    let (row, up) = (latent + rope, nope + v);
    // What pads tokens is whatever was gathered before, and nothing reads what comes of it.
    let tokens = padded(*tokens, scratch.latents.bytes() / (row * 2));
    let fit = scratch.expanded.bytes().checked_div(tokens * up * 2).unwrap_or(0);
    if !serves(mla, arena.dtype) || layer.row != row || fit == 0 {
        return Err(shape(OP, format!("{mla:?} over {layer:?} for {tokens} tokens")));
    }
    q.need(OP, "q", rows, &[heads, nope + rope], 2)?;
    need(OP, "kv_b", kv_b, &[heads, up, latent], 2)?;
    need(OP, "latents", &scratch.latents, &[later.pass.tokens, row], 2)?;
    need(OP, "out", out, &[rows, heads, v], 2)?;
    need(OP, "segments", later.plan.segments, &[segments.len()], size_of::<Segment>())?;
    need(OP, "first blocks", later.firsts, &[segments.len()], 4)?;
    let params = Params {
        arena: arena.address(),
        out: scratch.latents.address(),
        segments: later.plan.segments.address(),
        firsts: later.firsts.address(),
        tables: later.tables.address(),
        arena_elements: arena.len() as u64,
        layer_offset: layer.offset as u64,
    };
    let grid = [dim(OP, longest.div_ceil(BLOCK))?, dim(OP, segments.len())?, 1];
    Launch::new(on.kernel(GATHER)?, grid, THREADS).dependent().on(on.stream, &params)?;
    let (latents, tensor) = (&scratch.latents, |slice| Tensor::new(slice, Dtype::Bf16));
    let shared = Strided::dense(latents, row);
    for first in (0..heads).step_by(fit) {
        let here = fit.min(heads - first);
        let weights = kv_b.slice(first * up * latent * 2..(first + here) * up * latent * 2);
        let plain =
            Linear::plain(tensor(latents), &weights, tensor(&scratch.expanded), latent, here * up);
        linear(on, Rows::exactly(tokens), &Linear { x_stride: row, ..plain })?;
        let keys = Keys::Rows { up: &scratch.expanded, shared, width: row, rows: tokens };
        let of_heads = q.slice.slice(first * (nope + rope) * 2..q.slice.bytes());
        let operands = prompt::Operands {
            rows,
            heads,
            kv_heads: here,
            group: 1,
            qk: nope + rope,
            scale,
            q: Strided { slice: &of_heads, ..q },
            keys,
            out: &out.slice(first * v * 2..rows * heads * v * 2),
        };
        prompt::attention(on, &operands, &later.plan)?;
    }
    Ok(())
}
