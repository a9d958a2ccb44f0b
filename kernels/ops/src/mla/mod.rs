//! Multi-head latent attention (DeepSeek-V2, 2024) over the paged cache, in two forms.
//!
//! A token's KV is one latent of `latent` elements and `rope` rotated elements, shared by all heads;
//! `kv_b` (`[heads * (nope + v), latent]`) would expand the latent to each head's keys and values.
//! - [`Form::Absorbed`] moves the expansion to the query: `q W_uk` meets the latents directly, and
//!   the weighted sum of latents is expanded once. Cheap per key; right for few rows.
//! - [`Form::Expanded`] makes keys and values of 64 tokens at a time and uses them for all rows.
//!   Right for many rows. Tiles are merged by their running maximum, so the workspace is bounded.
//!
//! Both take any number of rows per sequence and agree within f32 rounding. Queries are
//! `[tokens, heads * (nope + rope)]`, already rotated. A row sees at least itself, so a softmax over
//! nothing does not occur; NaN in one sequence's cache reaches no other sequence. Invariant: within
//! a form, a row's bits depend on its query, its keys and the instruction set alone.

pub mod cuda;

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
mod reference;
#[cfg(test)]
mod tests;

use crate::Matrix;
use crate::paged::{Kv, KvLayer, Segment};
use crate::share::Shared;
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

impl Form {
    /// The name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Absorbed => "absorbed",
            Self::Expanded => "expanded",
        }
    }
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

/// Elements of scratch for steps of up to `rows` rows, whatever the context; proportional to the
/// threads.
#[must_use]
pub fn scratch_len(pool: &ThreadPool, shape: &Mla, rows: usize) -> usize {
    let piece = absorbed::scratch_len(shape, rows).max(expanded::scratch_len(shape, rows));
    piece * pool.threads()
}

/// What both forms work with.
struct Operands<'a> {
    isa: Isa,
    pool: &'a ThreadPool,
    q: &'a [f32],
    kv_b: Matrix<'a>,
    shape: &'a Mla,
    layer: KvLayer,
    arena: Kv<'a>,
}

impl Operands<'_> {
    /// Rows of the batch.
    const fn tokens(&self) -> usize {
        let Mla { heads, nope, rope, .. } = *self.shape;
        self.q.len() / (heads * (nope + rope))
    }
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
    let operands = Operands { isa: Isa::detect(), pool, q, kv_b, shape, layer, arena };
    run(&operands, segments, out, scratch, form);
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
    let operands = Operands { isa, pool, q, kv_b, shape, layer, arena };
    run(&operands, segments, out, scratch, |_| form);
}

fn run(
    operands: &Operands<'_>,
    segments: &[Segment<'_>],
    out: &mut [f32],
    scratch: &mut [f32],
    form: impl Fn(&Segment<'_>) -> Form,
) {
    let Mla { heads, nope, rope, v, latent, .. } = *operands.shape;
    assert!(heads > 0 && nope + rope > 0 && v > 0 && latent > 0, "{:?}", operands.shape);
    let tokens = operands.tokens();
    assert_eq!(operands.q.len(), tokens * heads * (nope + rope), "queries");
    assert_eq!(out.len(), tokens * heads * v, "outputs");
    assert_eq!((operands.kv_b.rows, operands.kv_b.cols), (heads * (nope + v), latent), "kv_b");
    assert_eq!(operands.layer.row, latent + rope, "a latent and its rotated part");
    let needed = scratch_len(operands.pool, operands.shape, tokens);
    assert!(scratch.len() >= needed, "scratch of {needed} elements, got {}", scratch.len());
    segments.iter().for_each(|segment| segment.check(tokens));
    let out = Shared::new(out);
    // Neighbours of one form go together; for the absorbed form only where their rows adjoin.
    for together in segments.chunk_by(|a, b| {
        form(a) == form(b) && (form(a) == Form::Expanded || a.start + a.len == b.start)
    }) {
        match form(&together[0]) {
            Form::Absorbed => absorbed::run(operands, together, &out, scratch),
            Form::Expanded => expanded::run(operands, together, &out, scratch),
        }
    }
}
