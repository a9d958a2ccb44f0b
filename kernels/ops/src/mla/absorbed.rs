//! One query row and head in latent space.

use super::{Mla, Operands, Running, score};
use crate::paged::{BLOCK, Segment};
use crate::share::Shared;
use crate::simd::{Element, axpy, dot};

/// The query in latent space and the weighted sum of latents.
pub(super) const fn piece_len(shape: &Mla) -> usize {
    2 * shape.latent
}

#[allow(clippy::too_many_arguments, reason = "the operands of attention")]
pub(super) fn row<E: Element, W: Element>(
    operands: &Operands<'_>,
    segment: &Segment<'_>,
    i: usize,
    head: usize,
    kv: &[E],
    kv_b: &[W],
    out: &Shared<'_, f32>,
    piece: &mut [f32],
) {
    let Operands { isa, q, shape, layer, .. } = *operands;
    let Mla { heads, nope, rope, v, latent, scale } = *shape;
    let token = segment.start + i;
    let q = &q[(token * heads + head) * (nope + rope)..][..nope + rope];
    let (q_nope, q_rope) = q.split_at(nope);
    let (q_latent, rest) = piece.split_at_mut(latent);
    let sum = &mut rest[..latent];
    q_latent.fill(0.0);
    sum.fill(0.0);
    let expand = &kv_b[head * (nope + v) * latent..][..(nope + v) * latent];
    for (x, w) in q_nope.iter().zip(expand.chunks_exact(latent)) {
        axpy(isa, *x, w, q_latent);
    }
    let end = segment.position(i) + 1;
    let mut running = Running::START;
    let mut scores = [0.0_f32; BLOCK];
    for block in 0..end.div_ceil(BLOCK) {
        let base = layer.block_start(segment.table, block);
        let count = (end - block * BLOCK).min(BLOCK);
        let line = |t: usize| &kv[base + t * layer.row..][..latent + rope];
        for (t, slot) in scores.iter_mut().enumerate().take(count) {
            let (key, rotated) = line(t).split_at(latent);
            *slot = score(isa, (q_latent, q_rope), (key, rotated)) * scale;
        }
        let shrink = running.absorb(&mut scores[..count]);
        sum.iter_mut().for_each(|x| *x *= shrink);
        for (t, weight) in scores[..count].iter().enumerate() {
            axpy(isa, *weight, &line(t)[..latent], sum);
        }
    }
    let inverse = 1.0 / running.mass;
    sum.iter_mut().for_each(|x| *x *= inverse);
    // SAFETY: each (row, head) belongs to exactly one item.
    let out = unsafe { out.part((token * heads + head) * v, v) };
    for (y, w) in out.iter_mut().zip(expand[nope * latent..].chunks_exact(latent)) {
        *y = dot(isa, sum, w);
    }
}
