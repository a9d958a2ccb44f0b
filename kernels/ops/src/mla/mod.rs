//! Multi-head latent attention (DeepSeek-V2, 2024) over the paged cache, in two forms.
//!
//! A token's KV is one latent of `latent` elements and `rope` rotated elements, shared by all heads;
//! `kv_b` (`[heads * (nope + v), latent]`) would expand the latent to each head's keys and values.
//! - [`Form::Absorbed`] moves the expansion to the query: `q W_uk` meets the latents directly, and
//!   the weighted sum of latents is expanded once. Cheap per key; right for few rows.
//! - [`Form::Expanded`] makes keys and values of 64 tokens at a time and uses them for all rows.
//!   Right for many rows. Tiles are merged by their running maximum, so the workspace is bounded.
//!
//! Both take any number of rows per sequence and agree within f32 rounding. A row's result does not
//! depend on other rows of its form. Queries are `[tokens, heads * (nope + rope)]`, already rotated.

macro_rules! with_kv {
    ($arena:expr, $kv:ident => $body:expr) => {
        match $arena {
            Kv::F32($kv) => $body,
            Kv::Bf16($kv) => $body,
        }
    };
}
macro_rules! with_weights {
    ($data:expr, $w:ident => $body:expr) => {
        match $data {
            WeightSlice::F32($w) => $body,
            WeightSlice::Bf16($w) => $body,
            WeightSlice::F16($w) => $body,
        }
    };
}

mod absorbed;
mod expanded;
#[cfg(test)]
mod tests;

use crate::paged::{Kv, KvLayer, Segment};
use crate::share::{PerThread, Shared};
use crate::simd::Element;
use crate::{Matrix, WeightSlice};
use device::{Isa, ThreadPool};

/// Shape of the attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mla {
    /// Query heads.
    pub heads: usize,
    /// Unrotated width of a query head.
    pub nope: usize,
    /// Rotated width.
    pub rope: usize,
    /// Width of a value head.
    pub v: usize,
    /// Width of the latent.
    pub latent: usize,
    /// Multiplies products of queries and keys.
    pub scale: f32,
}

/// Which of the two ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Queries into latent space.
    Absorbed,
    /// Latents into head space.
    Expanded,
}

/// Rows from which expanding the latents is cheaper than widening every query. Absorbed work per
/// row and key is `2 latent + rope` against `nope + rope + v`; expanding costs
/// `(nope + v) latent` per key once: with 512, 64, 128, 128 they meet at 171 rows.
#[must_use]
pub const fn select(shape: &Mla, rows: usize) -> Form {
    let absorbed = rows * (2 * shape.latent + shape.rope);
    let expanded =
        rows * (shape.nope + shape.rope + shape.v) + (shape.nope + shape.v) * shape.latent;
    if absorbed <= expanded { Form::Absorbed } else { Form::Expanded }
}

/// Elements of scratch for steps of up to `rows` rows.
#[must_use]
pub fn scratch_len(pool: &ThreadPool, shape: &Mla, rows: usize) -> usize {
    piece_len(shape, rows) * pool.threads()
}

fn piece_len(shape: &Mla, rows: usize) -> usize {
    absorbed::piece_len(shape).max(expanded::piece_len(shape, rows))
}

/// The operands that both forms share.
struct Operands<'a> {
    isa: Isa,
    q: &'a [f32],
    kv_b: Matrix<'a>,
    shape: &'a Mla,
    layer: KvLayer,
}

/// `out` is `[tokens, heads * v]`; the form is chosen per segment by its rows.
///
/// # Panics
/// When shapes do not fit, scratch is short, or a table names memory outside of the arena.
#[allow(clippy::too_many_arguments, reason = "the operands of attention")]
pub fn attention(
    pool: &ThreadPool,
    q: &[f32],
    kv_b: Matrix<'_>,
    shape: &Mla,
    layer: KvLayer,
    segments: &[Segment<'_>],
    arena: Kv<'_>,
    out: &mut [f32],
    scratch: &mut [f32],
) {
    let form = |segment: &Segment<'_>| select(shape, segment.len);
    let operands = Operands { isa: Isa::detect(), q, kv_b, shape, layer };
    run(pool, &operands, segments, arena, out, scratch, form);
}

/// As [`attention`], all segments in one form, on a given instruction set.
///
/// # Panics
/// As [`attention`].
#[allow(clippy::too_many_arguments, reason = "the operands of attention")]
pub fn attention_as(
    form: Form,
    isa: Isa,
    pool: &ThreadPool,
    q: &[f32],
    kv_b: Matrix<'_>,
    shape: &Mla,
    layer: KvLayer,
    segments: &[Segment<'_>],
    arena: Kv<'_>,
    out: &mut [f32],
    scratch: &mut [f32],
) {
    let operands = Operands { isa, q, kv_b, shape, layer };
    run(pool, &operands, segments, arena, out, scratch, |_| form);
}

fn run(
    pool: &ThreadPool,
    operands: &Operands<'_>,
    segments: &[Segment<'_>],
    arena: Kv<'_>,
    out: &mut [f32],
    scratch: &mut [f32],
    form: impl Fn(&Segment<'_>) -> Form,
) {
    let Mla { heads, nope, rope, v, latent, .. } = *operands.shape;
    let tokens = operands.q.len() / (heads * (nope + rope)).max(1);
    assert_eq!(operands.q.len(), tokens * heads * (nope + rope), "queries");
    assert_eq!(out.len(), tokens * heads * v, "outputs");
    assert_eq!((operands.kv_b.rows, operands.kv_b.cols), (heads * (nope + v), latent), "kv_b");
    assert_eq!(operands.layer.row, latent + rope, "a latent and its rotated part");
    let most = segments.iter().map(|segment| segment.len).max().unwrap_or(0);
    let pieces = PerThread::new(scratch, piece_len(operands.shape, most));
    let out = Shared::new(out);
    for segment in segments {
        match form(segment) {
            Form::Absorbed => pool.run(segment.len * heads, &|item| {
                let (i, head) = (item / heads, item % heads);
                pieces.with(|piece| {
                    with_kv!(arena, kv => with_weights!(operands.kv_b.data, w =>
                    absorbed::row(operands, segment, i, head, kv, w, &out, piece)))
                });
            }),
            Form::Expanded => pool.run(heads, &|head| {
                pieces.with(|piece| {
                    with_kv!(arena, kv => with_weights!(operands.kv_b.data, w =>
                    expanded::head(operands, segment, head, kv, w, &out, piece)))
                });
            }),
        }
    }
}

/// Scales and merges: what a running softmax does when a new maximum may have come.
struct Running {
    highest: f32,
    mass: f32,
}

impl Running {
    const START: Self = Self { highest: f32::NEG_INFINITY, mass: 0.0 };

    /// Turns scores into weights relative to the new maximum and returns by how much the sum so
    /// far shrinks.
    fn absorb(&mut self, scores: &mut [f32]) -> f32 {
        let top = scores.iter().copied().fold(self.highest, f32::max);
        let shrink = if self.highest == top { 1.0 } else { (self.highest - top).exp() };
        self.highest = top;
        self.mass *= shrink;
        for score in scores {
            *score = (*score - top).exp();
            self.mass += *score;
        }
        shrink
    }
}

/// A key's product with a query in two parts.
#[inline]
fn score<A: Element, B: Element>(isa: Isa, q: (&[f32], &[f32]), k: (&[A], &[B])) -> f32 {
    crate::simd::dot(isa, q.0, k.0) + crate::simd::dot(isa, q.1, k.1)
}
