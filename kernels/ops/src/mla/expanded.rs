//! One head for all rows of a segment, keys and values made 64 tokens at a time.

use super::{Mla, Operands, Running, score};
use crate::paged::{BLOCK, Segment};
use crate::share::Shared;
use crate::simd::{Element, axpy, dot};

/// A tile of keys and values, a latent widened to f32, and each row's running maximum and mass.
pub(super) const fn piece_len(shape: &Mla, rows: usize) -> usize {
    BLOCK * (shape.nope + shape.v) + shape.latent + 2 * rows
}

pub(super) fn head<E: Element, W: Element>(
    operands: &Operands<'_>,
    segment: &Segment<'_>,
    head: usize,
    kv: &[E],
    kv_b: &[W],
    out: &Shared<'_, f32>,
    piece: &mut [f32],
) {
    let Operands { isa, q, shape, layer, .. } = *operands;
    let Mla { heads, nope, rope, v, latent, scale } = *shape;
    let width = nope + v;
    let expand = &kv_b[head * width * latent..][..width * latent];
    let (tile, rest) = piece.split_at_mut(BLOCK * width);
    let (wide, rest) = rest.split_at_mut(latent);
    let (highest, rest) = rest.split_at_mut(segment.len);
    let mass = &mut rest[..segment.len];
    highest.fill(Running::START.highest);
    mass.fill(Running::START.mass);
    // SAFETY: each head's columns belong to exactly one item.
    let out_of = |i: usize| unsafe { out.part(((segment.start + i) * heads + head) * v, v) };
    (0..segment.len).for_each(|i| out_of(i).fill(0.0));

    for block in 0..segment.context.div_ceil(BLOCK) {
        let base = layer.block_start(segment.table, block);
        let count = (segment.context - block * BLOCK).min(BLOCK);
        let line = |t: usize| &kv[base + t * layer.row..][..latent + rope];
        for (t, made) in tile.chunks_exact_mut(width).enumerate().take(count) {
            wide.iter_mut().zip(line(t)).for_each(|(y, x)| *y = x.widen());
            for (y, w) in made.iter_mut().zip(expand.chunks_exact(latent)) {
                *y = dot(isa, wide, w);
            }
        }
        // Rows before this block's first key see nothing of it.
        let first = (block * BLOCK).saturating_sub(segment.position(0));
        for i in first..segment.len {
            let seen = (segment.position(i) + 1 - block * BLOCK).min(count);
            let at = ((segment.start + i) * heads + head) * (nope + rope);
            let q = q[at..at + nope + rope].split_at(nope);
            let mut scores = [0.0_f32; BLOCK];
            for (t, slot) in scores.iter_mut().enumerate().take(seen) {
                let key = &tile[t * width..t * width + nope];
                *slot = score(isa, q, (key, &line(t)[latent..])) * scale;
            }
            let mut running = Running { highest: highest[i], mass: mass[i] };
            let shrink = running.absorb(&mut scores[..seen]);
            (highest[i], mass[i]) = (running.highest, running.mass);
            let sum = out_of(i);
            sum.iter_mut().for_each(|x| *x *= shrink);
            for (t, weight) in scores[..seen].iter().enumerate() {
                axpy(isa, *weight, &tile[t * width + nope..(t + 1) * width], sum);
            }
        }
    }
    for (i, mass) in mass.iter().enumerate() {
        let inverse = 1.0 / mass;
        out_of(i).iter_mut().for_each(|x| *x *= inverse);
    }
}
