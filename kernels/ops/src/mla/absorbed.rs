//! Queries into latent space: `q W_uk` for a chunk of rows, attention over the latents as they lie
//! in the cache (all heads share them), then the weighted latents through `W_uv`.

use super::{Mla, Operands};
use crate::WeightSlice;
use crate::flash::{self, Piece, Queries, Slots, State, Work, visible};
use crate::paged::{BLOCK, Kv, Segment};
use crate::share::Shared;
use crate::tile::{Lines, Stored, dots, sums};
use std::ops::Range;

/// Query lines (rows times heads) that share a pass over the latents.
const TILE_LINES: usize = 64;
/// Pieces in flight per thread.
const SLOTS_PER_THREAD: usize = 8;
/// Rows per thread whose latent queries exist at once.
const CHUNK: usize = 32;
/// Columns of one item of the projections.
const COLS: usize = 128;
/// Rows that one pass over the projections' weights serves.
const ROWS: usize = 8;

/// Query rows of a tile.
fn tile(shape: &Mla) -> usize {
    (TILE_LINES / shape.heads).max(1)
}

fn slot_len(shape: &Mla) -> usize {
    State::len(tile(shape) * shape.heads, shape.latent)
}

/// Elements of a row's queries and results in latent space.
const fn latent_len(shape: &Mla) -> usize {
    shape.heads * (2 * shape.latent + shape.rope)
}

/// Elements per thread for steps of up to `rows` rows.
pub(super) fn scratch_len(shape: &Mla, rows: usize) -> usize {
    rows.min(CHUNK) * latent_len(shape) + SLOTS_PER_THREAD * slot_len(shape)
}

/// All rows of adjoining segments, a chunk at a time.
pub(super) fn run(
    operands: &Operands<'_>,
    segments: &[Segment<'_>],
    out: &Shared<'_, f32>,
    scratch: &mut [f32],
) {
    let shape = operands.shape;
    let chunk = operands.tokens().min(CHUNK) * operands.pool.threads();
    let (queries, rest) = scratch.split_at_mut(chunk * shape.heads * (shape.latent + shape.rope));
    let (results, slots) = rest.split_at_mut(chunk * shape.heads * shape.latent);
    let rows = segments[0].start..segments.last().map_or(0, |last| last.start + last.len);
    for begin in rows.clone().step_by(chunk) {
        let rows = begin..(begin + chunk).min(rows.end);
        with_weights!(operands.kv_b.data, w => absorb_queries(operands, w, &rows, queries));
        with_kv!(operands.arena, kv =>
            attend(operands, segments, kv, &rows, queries, results, slots));
        with_weights!(operands.kv_b.data, w => expand_results(operands, w, &rows, results, out));
    }
}

/// `queries[row][head] = (q_nope W_uk, q_rope)`.
fn absorb_queries<W: Stored>(
    operands: &Operands<'_>,
    w: &[W],
    rows: &Range<usize>,
    queries: &mut [f32],
) {
    let Operands { isa, pool, q, shape, .. } = *operands;
    let Mla { heads, nope, rope, v, latent, .. } = *shape;
    let queries = Shared::new(queries);
    let strips = latent.div_ceil(COLS);
    pool.run(heads * strips, &|item| {
        let (head, column) = (item / strips, item % strips * COLS);
        let cols = (latent - column).min(COLS);
        let weights = Lines::new(&w[head * (nope + v) * latent + column..], nope, cols, latent);
        for first in rows.clone().step_by(ROWS) {
            let count = (rows.end - first).min(ROWS);
            let mut product = [0.0; ROWS * COLS];
            let from = &q[(first * heads + head) * (nope + rope)..];
            sums(isa, count, from, heads * (nope + rope), weights, &mut product, COLS);
            for i in 0..count {
                let at = ((first + i - rows.start) * heads + head) * (latent + rope);
                // SAFETY: each (row, head, strip) belongs to one item.
                let cells = unsafe { queries.part(at + column, cols) };
                cells.copy_from_slice(&product[i * COLS..i * COLS + cols]);
                if column == 0 {
                    // SAFETY: the rotated part of each (row, head) belongs to its first strip.
                    let cells = unsafe { queries.part(at + latent, rope) };
                    let from = ((first + i) * heads + head) * (nope + rope) + nope;
                    cells.copy_from_slice(&q[from..from + rope]);
                }
            }
        }
    });
}

/// `results[row][head] = softmax(query . latents) latents`.
fn attend<E: Stored>(
    operands: &Operands<'_>,
    segments: &[Segment<'_>],
    kv: &[E],
    rows: &Range<usize>,
    queries: &[f32],
    results: &mut [f32],
    slots: &mut [f32],
) {
    let Operands { isa, pool, shape, layer, .. } = *operands;
    let Mla { heads, rope, latent, scale, .. } = *shape;
    let width = latent + rope;
    let work = Work { segments, rows: rows.clone(), heads: 1, tile: tile(shape), window: None };
    let slots = Slots { memory: slots, len: slot_len(shape), lines: heads, width: latent };
    let results = Shared::new(results);
    // The first line of a piece among those of the chunk.
    let line = |piece: &Piece| (segments[piece.segment].start + piece.first - rows.start) * heads;
    let compute = |piece: &Piece, state: &mut State<'_>, _: &mut [f32]| {
        let segment = &segments[piece.segment];
        let lines = Lines::new(&queries[line(piece) * width..], piece.rows * heads, width, width);
        let queries = Queries { isa, lines, scale };
        for block in piece.begin / BLOCK..piece.end.div_ceil(BLOCK) {
            let base = block * BLOCK;
            let cached = &kv[layer.block(kv.len(), segment.table, block)];
            let count = (piece.end - base).min(BLOCK);
            let keys = Lines::new(cached, count, width, layer.row);
            let values = Lines::new(cached, count, latent, layer.row);
            state.absorb(queries, keys, values, |m| {
                let seen = visible(segment.position(piece.first + m / heads), None);
                0..seen.end.saturating_sub(base).min(count)
            });
        }
    };
    let finish = |piece: &Piece, state: &State<'_>| {
        for m in 0..piece.rows * heads {
            let at = (line(piece) + m) * latent;
            // SAFETY: a tile is finished once, and its lines are no other tile's.
            state.finish(m, unsafe { results.part(at, latent) });
        }
    };
    flash::run(pool, &work, slots, &compute, &finish);
}

/// `out[row][head] = results[row][head] W_uv^T`.
fn expand_results<W: Stored>(
    operands: &Operands<'_>,
    w: &[W],
    rows: &Range<usize>,
    results: &[f32],
    out: &Shared<'_, f32>,
) {
    let Operands { isa, pool, shape, .. } = *operands;
    let Mla { heads, nope, v, latent, .. } = *shape;
    let strips = v.div_ceil(COLS);
    pool.run(heads * strips, &|item| {
        let (head, column) = (item / strips, item % strips * COLS);
        let cols = (v - column).min(COLS);
        let first_weight = (head * (nope + v) + nope + column) * latent;
        let weights = Lines::new(&w[first_weight..], cols, latent, latent);
        for first in rows.clone().step_by(ROWS) {
            let count = (rows.end - first).min(ROWS);
            let from = &results[((first - rows.start) * heads + head) * latent..];
            let from = Lines::new(from, count, latent, heads * latent);
            let mut product = [0.0; ROWS * COLS];
            dots(isa, from, weights, 1.0, &mut product, COLS);
            for i in 0..count {
                let at = ((first + i) * heads + head) * v + column;
                // SAFETY: each (row, head, strip) belongs to one item.
                let cells = unsafe { out.part(at, cols) };
                cells.copy_from_slice(&product[i * COLS..i * COLS + cols]);
            }
        }
    });
}
