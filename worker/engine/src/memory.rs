//! What steps take beside weights and cache: pure arithmetic on a lowered program, so that a plan
//! can be refused before anything is loaded.
//!
//! It allocates nothing. Invariant: not less than what an engine allocates when configured.

use device::ThreadPool;
use ids::{Bytes, Tokens};
use model::lower::{LocalAttention, Lowered, Op, Rows};
use model::memory::activation_bytes;
use ops::sample::Seen;
use ops::{gqa, mla, moe};

/// Rows of logits computed at once, at most.
pub const HEAD_ROWS: usize = 64;

/// Bytes of activations, logits, routing and scratch for steps of up to `tokens` tokens.
#[must_use]
pub fn step_bytes(lowered: &Lowered, tokens: usize, threads: usize) -> Bytes {
    // Scratch is a piece per thread; the calling thread alone needs no other to be started.
    let one = ThreadPool::new(1);
    let (mut scratch, mut experts, mut routing) = (0, 0, 0);
    for op in lowered.body.iter().chain(&lowered.head) {
        match *op {
            Op::Linear { x, .. } => {
                let cols = lowered.buffers[x.0].width;
                scratch = scratch.max(ops::linear::scratch_len(&one, cols));
            }
            Op::Attention {
                attention: LocalAttention::Gqa { heads, kv_heads, head_dim, scale, window },
                ..
            } => {
                let shape = gqa::Gqa { heads, kv_heads, head_dim, scale: scale as f32, window };
                scratch = scratch.max(gqa::scratch_len(&one, &shape));
            }
            Op::Attention {
                attention: LocalAttention::Mla { heads, nope, rope, v, latent, scale, .. },
                ..
            } => {
                let shape = mla::Mla { heads, nope, rope, v, latent, scale: scale as f32 };
                scratch = scratch.max(mla::scratch_len(&one, &shape, tokens));
            }
            Op::Experts { x, top_k, intermediate, .. } => {
                let hidden = lowered.buffers[x.0].width;
                let tokens = match lowered.buffers[x.0].rows {
                    Rows::Shard => tokens,
                    Rows::AllShards(shards) => tokens * shards,
                };
                let panels = ops::linear::scratch_len(&one, hidden.max(intermediate));
                let rest = moe::Scratch::bytes(tokens, top_k, hidden, intermediate);
                experts = experts.max(rest + panels * threads * size_of::<f32>());
                routing = routing.max(tokens * top_k * (size_of::<u32>() + size_of::<f32>()));
            }
            _ => {}
        }
    }
    let activations = activation_bytes(lowered, tokens, HEAD_ROWS).0;
    let scratch = scratch.saturating_mul(threads).saturating_mul(size_of::<f32>());
    let rest = scratch.saturating_add(experts).saturating_add(routing) as u64;
    Bytes(activations.saturating_add(rest))
}

/// Bytes of the penalties' counts when every slot uses them, contexts as long as may be.
#[must_use]
pub fn penalty_bytes(slots: u32, max_context: Tokens, vocab: u32) -> Bytes {
    let each = Seen::bytes(max_context.0.min(vocab) as usize) as u64;
    Bytes(each.saturating_mul(u64::from(slots)))
}
