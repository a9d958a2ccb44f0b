//! Latents into head space: keys and values of one head are made for 64 tokens at a time, and all
//! rows of a tile use them while they are in cache.

use super::{Mla, Operands};
use crate::WeightSlice;
use crate::flash::{self, Piece, Queries, Slots, State, Work, visible};
use crate::paged::{BLOCK, Kv, Segment};
use crate::share::Shared;
use crate::tile::{Lines, Stored, dots};

/// Query rows of a tile: the more, the less is expanded twice.
const TILE: usize = 1024;
/// Pieces in flight per thread.
const SLOTS_PER_THREAD: usize = 4;
/// Latents that stay in the nearest cache while the weights stream by.
const LATENTS: usize = 16;

/// A state, keys and values of a block, and its latents as f32.
fn slot_len(shape: &Mla, rows: usize) -> usize {
    let Mla { nope, rope, v, latent, .. } = *shape;
    State::len(rows.min(TILE), v) + BLOCK * (nope + rope + v) + LATENTS * latent
}

/// Elements per thread for steps of up to `rows` rows.
pub(super) fn scratch_len(shape: &Mla, rows: usize) -> usize {
    SLOTS_PER_THREAD * slot_len(shape, rows)
}

pub(super) fn run(
    operands: &Operands<'_>,
    segments: &[Segment<'_>],
    out: &Shared<'_, f32>,
    scratch: &mut [f32],
) {
    let Operands { pool, shape, .. } = *operands;
    let Mla { heads, v, .. } = *shape;
    let tokens = operands.tokens();
    let work = Work { segments, rows: 0..tokens, heads, tile: TILE, window: None };
    let slots = Slots { memory: scratch, len: slot_len(shape, tokens), lines: 1, width: v };
    let compute = |piece: &Piece, state: &mut State<'_>, rest: &mut [f32]| {
        let segment = &segments[piece.segment];
        with_kv!(operands.arena, kv => with_weights!(operands.kv_b.data, w =>
            attend(operands, segment, piece, kv, w, state, rest)));
    };
    let finish = |piece: &Piece, state: &State<'_>| {
        for m in 0..piece.rows {
            let token = segments[piece.segment].start + piece.first + m;
            // SAFETY: a tile of a head is finished once, and its cells are no other tile's.
            state.finish(m, unsafe { out.part((token * heads + piece.head) * v, v) });
        }
    };
    flash::run(pool, &work, slots, &compute, &finish);
}

fn attend<E: Stored, W: Stored>(
    operands: &Operands<'_>,
    segment: &Segment<'_>,
    piece: &Piece,
    kv: &[E],
    w: &[W],
    state: &mut State<'_>,
    rest: &mut [f32],
) {
    let Operands { isa, q, shape, layer, .. } = *operands;
    let Mla { heads, nope, rope, v, latent, scale } = *shape;
    let w = &w[piece.head * (nope + v) * latent..(piece.head + 1) * (nope + v) * latent];
    let key_weights = Lines::new(w, nope, latent, latent);
    let value_weights = Lines::new(&w[nope * latent..], v, latent, latent);
    let (keys, rest) = rest.split_at_mut(BLOCK * (nope + rope));
    let (values, rest) = rest.split_at_mut(BLOCK * v);
    let wide = &mut rest[..LATENTS * latent];
    let first = ((segment.start + piece.first) * heads + piece.head) * (nope + rope);
    let lines = Lines::new(&q[first..], piece.rows, nope + rope, heads * (nope + rope));
    let queries = Queries { isa, lines, scale };
    for block in piece.begin / BLOCK..piece.end.div_ceil(BLOCK) {
        let base = block * BLOCK;
        let cached = &kv[layer.block(kv.len(), segment.table, block)];
        let count = (piece.end - base).min(BLOCK);
        let cached = Lines::new(cached, count, latent + rope, layer.row);
        for t in (0..count).step_by(LATENTS) {
            let some = (count - t).min(LATENTS);
            for (i, wide) in wide.chunks_exact_mut(latent).take(some).enumerate() {
                let (plain, turned) = cached.line(t + i).split_at(latent);
                wide.iter_mut().zip(plain).for_each(|(y, x)| *y = x.widen());
                let key = &mut keys[(t + i) * (nope + rope) + nope..][..rope];
                key.iter_mut().zip(turned).for_each(|(y, x)| *y = x.widen());
            }
            let wide = Lines::new(wide, some, latent, latent);
            dots(isa, wide, key_weights, 1.0, &mut keys[t * (nope + rope)..], nope + rope);
            dots(isa, wide, value_weights, 1.0, &mut values[t * v..], v);
        }
        let keys = Lines::new(keys, count, nope + rope, nope + rope);
        let values = Lines::new(values, count, v, v);
        state.absorb(queries, keys, values, |m| {
            let seen = visible(segment.position(piece.first + m), None);
            0..seen.end.saturating_sub(base).min(count)
        });
    }
}
