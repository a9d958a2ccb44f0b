//! Latent attention in the expanded form on a device, for prompts: keys and values of all heads are
//! projected up from latents. Those of prompts that lie in the step as a whole are the step's own, and
//! nothing is read from the cache; those of others come from there (`later`).
//!
//! Short segments run absorbed. Invariant: a segment is whole, later or absorbed, never two of them.

pub mod later;
#[cfg(test)]
mod tests;

use super::super::Mla;
use crate::cuda::{Dtype, Queue, Rows, Strided, Tensor, need, shape};
use crate::flash::cuda::Segment;
use crate::flash::cuda::prompt::{self, Cut, Keys};
use crate::linear::cuda::{Linear, linear};
use device::cuda::{Arena, CudaError, DeviceSlice};

const OP: &str = "expanded mla";
/// Fewest rows that are worth the projection of their latents.
const LEAST: u32 = 16;

/// Whether the kernel serves the widths.
#[must_use]
pub fn serves(mla: &Mla, dtype: Dtype) -> bool {
    dtype == Dtype::Bf16 && (mla.nope, mla.rope, mla.v, mla.latent) == (128, 64, 128, 512)
}

/// How prompts are cut into tiles.
#[must_use]
pub const fn cut() -> Cut {
    match Cut::new(1, 192) {
        Some(cut) => cut,
        None => unreachable!(),
    }
}

/// Whether a segment is computed here: a prompt of the step alone.
#[must_use]
pub const fn is_whole(segment: &Segment) -> bool {
    segment.context == segment.len && segment.len >= LEAST
}

/// Whether a segment is computed here: a prompt or a chunk of one.
#[must_use]
pub const fn is_expanded(segment: &Segment) -> bool {
    is_whole(segment) || later::is_later(segment)
}

/// Memory of a step, made once.
#[derive(Clone, Debug)]
pub struct Scratch {
    /// Latents and keys out of the cache.
    latents: DeviceSlice,
    /// Keys and values of heads.
    expanded: DeviceSlice,
}

/// What [`Scratch`] holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Tokens out of the cache.
    pub latents: usize,
    /// Tokens with keys and values of all heads; those of fewer heads hold as many more.
    pub expanded: usize,
}

impl Room {
    /// For steps of up to `rows` rows in up to `slots` sequences of up to `context` tokens: one sequence
    /// fits, and a head of it, and more of them as far as that takes no more than a fixed size.
    #[must_use]
    pub fn new(mla: &Mla, rows: usize, slots: usize, context: usize) -> Self {
        /// Tokens projected at once, at most, unless the step itself has more.
        const MOST: usize = 1 << 15;
        /// The same in bytes.
        const MOST_BYTES: usize = 1 << 29;
        let all = slots.saturating_mul(context).min(MOST);
        let fit = MOST_BYTES / Self::expanded_bytes(mla, 1).max(1);
        let latents = context.max(all);
        let least = latents.div_ceil(mla.heads.max(1)).max(rows);
        Self { latents, expanded: latents.min(MOST).min(fit).max(least) }
    }

    const fn expanded_bytes(mla: &Mla, tokens: usize) -> usize {
        tokens * mla.heads * (mla.nope + mla.v) * 2
    }

    const fn latent_bytes(self, mla: &Mla) -> usize {
        self.latents * (mla.latent + mla.rope) * 2
    }
}

impl Scratch {
    /// Bytes of device memory.
    #[must_use]
    pub const fn bytes(mla: &Mla, room: Room) -> usize {
        Arena::padded(room.latent_bytes(mla))
            + Arena::padded(Room::expanded_bytes(mla, room.expanded))
    }

    /// Cuts it from an arena.
    ///
    /// # Errors
    /// When the arena is used up.
    pub fn take(arena: &mut Arena, mla: &Mla, room: Room) -> Result<Self, CudaError> {
        Ok(Self {
            latents: arena.take("latents of prompts", room.latent_bytes(mla))?,
            expanded: arena.take(OP, Room::expanded_bytes(mla, room.expanded))?,
        })
    }
}

/// Rows of `q` are `[heads * 192]`, rotated; of `kv` `[576]`, latents normed and keys rotated; `kv_b`
/// `[heads * 256, 512]`; rows of whole prompts, those of the plan, in `out`, `[rows, heads * 128]`, are
/// written. Segments of the plan have their first row as `table`.
///
/// # Errors
/// When widths are others, an operand is too short, or a launch fails.
#[allow(clippy::too_many_arguments, reason = "the operands of attention")]
pub fn attention(
    on: Queue<'_>,
    rows: Rows<'_>,
    mla: &Mla,
    q: Strided<'_>,
    kv: Strided<'_>,
    kv_b: &DeviceSlice,
    plan: &prompt::Plan<'_>,
    scratch: &Scratch,
    out: &DeviceSlice,
) -> Result<(), CudaError> {
    let Mla { heads, nope, rope, v, latent, scale } = *mla;
    if !serves(mla, Dtype::Bf16) || heads == 0 {
        return Err(shape(OP, format!("{mla:?}")));
    }
    let expanded = &scratch.expanded;
    let (padded, width) = (rows.padded, heads * (nope + v));
    q.need(OP, "q", padded, &[heads, nope + rope], 2)?;
    kv.need(OP, "kv", padded, &[latent + rope], 2)?;
    need(OP, "kv_b", kv_b, &[heads, nope + v, latent], 2)?;
    need(OP, "keys and values", expanded, &[padded, width], 2)?;
    need(OP, "out", out, &[padded, heads, v], 2)?;
    let tensor = |slice| Tensor::new(slice, Dtype::Bf16);
    let plain = Linear::plain(tensor(kv.slice), kv_b, tensor(expanded), latent, width);
    linear(on, rows, &Linear { x_stride: kv.stride, ..plain })?;
    let (shared, width) = (kv, latent + rope);
    let keys = Keys::Rows { up: expanded, shared, width, rows: padded };
    let operands = prompt::Operands {
        rows: padded,
        heads,
        kv_heads: heads,
        group: 1,
        qk: nope + rope,
        scale,
        q,
        keys,
        out,
    };
    prompt::attention(on, &operands, plan)
}
