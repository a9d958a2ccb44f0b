//! Ops in a row that decoding steps run as few launches: latent attention with all that lies between
//! the projections in front of it and the one behind.
//!
//! It finds them in a program and launches nothing. Invariant: what is found means the same in the
//! order of its kernels, three or one, as op by op; the ops stay beside, for other steps.

use super::launch::{Latent, Layer, Place, heads};
use super::sizes::{Attention, attention_of};
use device::cuda::DeviceSlice;
use model::lower::{Lowered, Op};
use ops::cuda::Dtype;
use ops::mla::{self, cuda::block};

/// Latent attention of decoding rows.
pub(super) struct Block {
    /// Queries as projected.
    pub(super) q: Place,
    /// Latent and key as projected.
    pub(super) kv: Place,
    /// Of the latent's norm.
    pub(super) norm: DeviceSlice,
    pub(super) eps: f32,
    /// Of queries and key.
    pub(super) rotation: usize,
    pub(super) shape: mla::Mla,
    pub(super) weights: Latent,
    pub(super) layer: Layer,
    pub(super) spec: usize,
    pub(super) out: Place,
}

/// The ops of a block.
#[derive(Clone, Copy)]
pub(super) struct Found<'a> {
    /// The projection of latents, which lies between them.
    pub(super) projection: &'a Op,
    /// The others: queries rotated, latent normed, key rotated, both written, attention.
    pub(super) apart: [&'a Op; 5],
}

impl Found<'_> {
    /// All ops.
    pub(super) const LENGTH: usize = 6;
}

/// The block that `ops` begin with, if they do and kernels serve it.
pub(super) fn find<'a>(lowered: &Lowered, ops: &'a [Op], dtype: Dtype) -> Option<Found<'a>> {
    let [rotate, projection, norm, turn, write, attend, ..] = ops else { return None };
    let (
        Op::Rope { x: rotated, rope: of_q, slice: queries },
        Op::Linear { x: from, out: kv, .. },
        Op::HeadNorm { x: normed, slice: latent, .. },
        Op::Rope { x: turned, rope: of_key, slice: key },
        Op::WriteKv { rows: written, slot: to },
        Op::Attention { q, attention, slot, .. },
    ) = (rotate, projection, norm, turn, write, attend)
    else {
        return None;
    };
    let Attention::Mla(shape) = attention_of(attention) else { return None };
    // Queries may be rotated after latents are projected where these read none of them.
    let same = rotated == q
        && from != q
        && [normed, turned, written] == [kv; 3]
        && of_q.0 == of_key.0
        && to == slot;
    let slices =
        [heads(lowered, *q, queries), heads(lowered, *kv, latent), heads(lowered, *kv, key)];
    let served = block::serves(&shape, Layer::of(lowered, *slot).kv, dtype);
    (same && served && slices == block::heads(&shape))
        .then_some(Found { projection, apart: [rotate, norm, turn, write, attend] })
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::lower::lower;
    use model::mesh::{Mesh, Rank};

    fn count(latent: usize, dtype: Dtype) -> usize {
        let config = format!(
            r#"{{"model_type": "deepseek_v3", "vocab_size": 64, "hidden_size": 32,
            "num_hidden_layers": 3, "num_attention_heads": 5, "intermediate_size": 48,
            "max_position_embeddings": 512, "kv_lora_rank": {latent}, "q_lora_rank": 12,
            "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
            "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
            "n_shared_experts": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1}}"#
        );
        let config = model::config::parse(&config).expect("a config").config;
        let program = model::families::program(&config, false);
        let lowered = lower(&program, Mesh::SINGLE, Rank(0), 64).expect("one rank");
        let all = 0..lowered.body.len();
        all.filter(|at| find(&lowered, &lowered.body[*at..], dtype).is_some()).count()
    }

    #[test]
    fn every_layer_of_the_widths_that_kernels_serve_has_a_block() {
        assert_eq!(count(512, Dtype::Bf16), 3);
        assert_eq!(count(512, Dtype::F32), 0);
        assert_eq!(count(256, Dtype::Bf16), 0);
    }
}
