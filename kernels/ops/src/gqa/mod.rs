//! Grouped-query attention over the paged cache: causal, optionally inside a sliding window, any
//! number of query rows per sequence.
//!
//! A row's softmax runs over blocks of 64 keys with a running maximum (Milakov and Gimelshein,
//! 2018), always from the first key on, so a row's result does not depend on its batch or chunk.
//! KV rows hold the keys of all KV heads, then the values. Every row sees at least itself.

use crate::paged::{BLOCK, Kv, KvLayer, Segment};
use crate::share::Shared;
use crate::simd::{Element, axpy, dot};
use device::{Isa, ThreadPool};

#[cfg(test)]
mod tests;

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

/// `out` and `q` are `[tokens, heads * head_dim]`; segments cover the rows to compute.
///
/// # Panics
/// When shapes do not fit, or a table names memory outside of the arena.
pub fn attention(
    pool: &ThreadPool,
    q: &[f32],
    shape: &Gqa,
    layer: KvLayer,
    segments: &[Segment<'_>],
    arena: Kv<'_>,
    out: &mut [f32],
) {
    attention_on(Isa::detect(), pool, q, shape, layer, segments, arena, out);
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
) {
    assert_eq!(q.len(), out.len(), "as many rows out as in");
    assert!(shape.kv_heads > 0 && shape.heads.is_multiple_of(shape.kv_heads), "{shape:?}");
    assert_eq!(layer.row, 2 * shape.kv_heads * shape.head_dim, "keys and values");
    let out = Shared::new(out);
    for segment in segments {
        // One item per row and KV head: its query heads read the same keys while they are close.
        pool.run(segment.len * shape.kv_heads, &|item| {
            let (i, kv_head) = (item / shape.kv_heads, item % shape.kv_heads);
            let row = Row { isa, shape, layer, segment, i, kv_head };
            match arena {
                Kv::F32(arena) => row.attend(q, arena, &out),
                Kv::Bf16(arena) => row.attend(q, arena, &out),
            }
        });
    }
}

/// One query row against one KV head.
struct Row<'a> {
    isa: Isa,
    shape: &'a Gqa,
    layer: KvLayer,
    segment: &'a Segment<'a>,
    i: usize,
    kv_head: usize,
}

impl Row<'_> {
    fn attend<E: Element>(&self, q: &[f32], arena: &[E], out: &Shared<'_, f32>) {
        let Gqa { heads, kv_heads, head_dim, scale, window } = *self.shape;
        let group = heads / kv_heads;
        let end = self.segment.position(self.i) + 1;
        let begin = window.map_or(0, |window| end.saturating_sub(window));
        for head in self.kv_head * group..(self.kv_head + 1) * group {
            let at = ((self.segment.start + self.i) * heads + head) * head_dim;
            let q = &q[at..at + head_dim];
            // SAFETY: each (row, head) belongs to exactly one item.
            let sum = unsafe { out.part(at, head_dim) };
            sum.fill(0.0);
            let (mut highest, mut mass) = (f32::NEG_INFINITY, 0.0_f32);
            let mut scores = [0.0_f32; BLOCK];
            for block in begin / BLOCK..end.div_ceil(BLOCK) {
                let base = self.layer.block_start(self.segment.table, block);
                let first = begin.saturating_sub(block * BLOCK);
                let last = (end - block * BLOCK).min(BLOCK);
                let row = |t: usize| base + t * self.layer.row + self.kv_head * head_dim;
                let mut top = highest;
                for t in first..last {
                    let key = &arena[row(t)..row(t) + head_dim];
                    scores[t] = dot(self.isa, q, key) * scale;
                    top = top.max(scores[t]);
                }
                // A NaN score does not raise the maximum; it still poisons the mass below.
                let shrink = if highest == top { 1.0 } else { (highest - top).exp() };
                highest = top;
                mass *= shrink;
                sum.iter_mut().for_each(|x| *x *= shrink);
                for (t, score) in scores.iter().enumerate().take(last).skip(first) {
                    let weight = (score - highest).exp();
                    mass += weight;
                    let value = row(t) + kv_heads * head_dim;
                    axpy(self.isa, weight, &arena[value..value + head_dim], sum);
                }
            }
            let inverse = 1.0 / mass;
            sum.iter_mut().for_each(|x| *x *= inverse);
        }
    }
}
