//! Grouped-query attention over the paged cache: causal, optionally inside a sliding window, any
//! number of query rows per sequence.
//!
//! KV rows hold the keys of all KV heads, then the values. A row sees at least itself, so a softmax
//! over nothing does not occur. What one sequence's cache holds, NaN included, reaches no other
//! sequence. Invariant: a row's bits depend on its query, its keys and the instruction set alone.

pub mod cuda;

#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use crate::flash::{self, Piece, Queries, Slots, State, Work, visible};
use crate::paged::{BLOCK, Kv, KvLayer, Segment};
use crate::share::Shared;
use crate::tile::{Lines, Stored};
use device::{Isa, ThreadPool};

/// Query lines (rows times heads of a group) that share a pass over the keys.
const TILE_LINES: usize = 64;
/// Pieces in flight per thread.
const SLOTS_PER_THREAD: usize = 8;

/// Shape of the attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gqa {
    /// Query heads.
    pub heads: usize,
    /// Key-value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Multiplies products of queries and keys.
    pub scale: f32,
    /// Tokens seen, the newest included; `None` for all.
    pub window: Option<usize>,
}

impl Gqa {
    /// Query heads of a KV head.
    const fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Query rows of a tile.
    fn tile(&self) -> usize {
        (TILE_LINES / self.group()).max(1)
    }

    /// A state and the tile's queries side by side.
    fn slot_len(&self) -> usize {
        let lines = self.tile() * self.group();
        State::len(lines, self.head_dim) + lines * self.head_dim
    }
}

/// Elements of scratch that [`attention`] needs, whatever the batch and the context.
#[must_use]
pub fn scratch_len(pool: &ThreadPool, shape: &Gqa) -> usize {
    shape.slot_len() * SLOTS_PER_THREAD * pool.threads()
}

/// `out` and `q` are `[tokens, heads * head_dim]`; segments cover the rows to compute.
///
/// # Panics
/// When shapes do not fit, scratch is short, or a table names memory outside of the arena.
#[allow(clippy::too_many_arguments, reason = "the operands of attention")]
pub fn attention(
    pool: &ThreadPool,
    q: &[f32],
    shape: &Gqa,
    layer: KvLayer,
    segments: &[Segment<'_>],
    arena: Kv<'_>,
    out: &mut [f32],
    scratch: &mut [f32],
) {
    attention_on(Isa::detect(), pool, q, shape, layer, segments, arena, out, scratch);
}

/// As [`attention`], on a given instruction set.
///
/// # Panics
/// As [`attention`].
#[allow(clippy::too_many_arguments, reason = "the operands of attention")]
pub fn attention_on(
    isa: Isa,
    pool: &ThreadPool,
    q: &[f32],
    shape: &Gqa,
    layer: KvLayer,
    segments: &[Segment<'_>],
    arena: Kv<'_>,
    out: &mut [f32],
    scratch: &mut [f32],
) {
    let Gqa { heads, kv_heads, head_dim, window, .. } = *shape;
    assert_eq!(q.len(), out.len(), "as many rows out as in");
    assert!(kv_heads > 0 && heads > 0 && heads.is_multiple_of(kv_heads), "{shape:?}");
    assert!(window != Some(0), "a row sees at least itself");
    assert_eq!(layer.row, 2 * kv_heads * head_dim, "keys and values");
    let tokens = q.len() / (heads * head_dim).max(1);
    segments.iter().for_each(|segment| segment.check(tokens));
    let (group, tile) = (shape.group(), shape.tile());
    let work = Work { segments, rows: 0..tokens, heads: kv_heads, tile, window };
    let len = shape.slot_len();
    let slots = Slots { memory: scratch, len, lines: group, width: head_dim };
    let out = Shared::new(out);
    // Line `m` of a piece is a head of a row; where it lies in `q` and `out`.
    let place = |piece: &Piece, m: usize| {
        let token = segments[piece.segment].start + piece.first + m / group;
        (token * heads + piece.head * group + m % group) * head_dim
    };
    let compute = |piece: &Piece, state: &mut State<'_>, queries: &mut [f32]| {
        for (m, line) in queries.chunks_exact_mut(head_dim).take(piece.rows * group).enumerate() {
            let at = place(piece, m);
            line.copy_from_slice(&q[at..at + head_dim]);
        }
        let lines = Lines::new(queries, piece.rows * group, head_dim, head_dim);
        let queries = Queries { isa, lines, scale: shape.scale };
        let segment = &segments[piece.segment];
        match arena {
            Kv::F32(arena) => attend(shape, layer, segment, piece, queries, arena, state),
            Kv::Bf16(arena) => attend(shape, layer, segment, piece, queries, arena, state),
        }
    };
    let finish = |piece: &Piece, state: &State<'_>| {
        for m in 0..piece.rows * group {
            // SAFETY: a tile of a head is finished once, and its lines are no other tile's.
            state.finish(m, unsafe { out.part(place(piece, m), head_dim) });
        }
    };
    flash::run(pool, &work, slots, &compute, &finish);
}

/// The keys of a piece, block by block.
fn attend<E: Stored>(
    shape: &Gqa,
    layer: KvLayer,
    segment: &Segment<'_>,
    piece: &Piece,
    queries: Queries<'_>,
    arena: &[E],
    state: &mut State<'_>,
) {
    let Gqa { kv_heads, head_dim, window, .. } = *shape;
    let group = shape.group();
    let key = piece.head * head_dim;
    let value = key + kv_heads * head_dim;
    for block in piece.begin / BLOCK..piece.end.div_ceil(BLOCK) {
        let base = block * BLOCK;
        let rows = &arena[layer.block(arena.len(), segment.table, block)];
        let count = (piece.end - base).min(BLOCK);
        let keys = Lines::new(&rows[key..], count, head_dim, layer.row);
        let values = Lines::new(&rows[value..], count, head_dim, layer.row);
        state.absorb(queries, keys, values, |m| {
            let seen = visible(segment.position(piece.first + m / group), window);
            let begin = seen.start.saturating_sub(base);
            let end = seen.end.saturating_sub(base).min(count);
            if begin < end { begin..end } else { 0..0 }
        });
    }
}
