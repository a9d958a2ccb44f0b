//! Ops in a row that decoding steps run as few launches: attention with all that lies between the
//! projections in front of it and the one behind, which for latent attention are three launches and for
//! grouped-query attention one.
//!
//! It finds them in a program and launches nothing. Invariant: what is found means the same in the
//! order of its kernels as op by op; the ops stay beside, for other steps.

use super::launch::{Latent, Layer, Place, heads};
use super::sizes::{Attention, attention_of};
use device::cuda::DeviceSlice;
use model::lower::{Lowered, Op};
use ops::cuda::Dtype;
use ops::gqa::{self, cuda::decode as grouped};
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

/// Grouped-query attention of decoding rows.
pub(super) struct Grouped {
    /// Queries as projected.
    pub(super) q: Place,
    /// Keys and values as projected.
    pub(super) kv: Place,
    /// Of queries and keys: weight and epsilon.
    pub(super) norms: Option<[(DeviceSlice, f32); 2]>,
    /// Of queries and keys.
    pub(super) rotation: usize,
    pub(super) shape: gqa::Gqa,
    pub(super) layer: Layer,
    pub(super) spec: usize,
    pub(super) out: Place,
}

/// How many ops `ops` begin with that are norms and rotation of queries and keys, their write and
/// attention, if kernels serve them as one.
pub(super) fn find_grouped(lowered: &Lowered, ops: &[Op], dtype: Dtype) -> Option<usize> {
    let norms = ops.iter().take_while(|op| matches!(op, Op::HeadNorm { .. })).count();
    let [
        Op::Rope { x: rotated, rope, slice: queries },
        Op::Rope { x: turned, rope: of_key, slice: keys },
        Op::WriteKv { rows: written, slot: to },
        Op::Attention { q, attention, slot, .. },
        ..,
    ] = &ops[norms..]
    else {
        return None;
    };
    let Attention::Gqa(shape) = attention_of(attention) else { return None };
    let normed = match &ops[..norms] {
        [] => true,
        [Op::HeadNorm { x: a, slice: of_a, .. }, Op::HeadNorm { x: b, slice: of_b, .. }] => {
            (a, b) == (q, written) && (of_a, of_b) == (queries, keys)
        }
        _ => false,
    };
    let rotates = lowered.ropes.get(rope.0).is_some_and(|rope| !rope.interleaved);
    let same = q != written && (rotated, turned) == (q, written) && rope.0 == of_key.0;
    let heads = [heads(lowered, *q, queries), heads(lowered, *written, keys)];
    let served = grouped::serves(&shape, Layer::of(lowered, *slot).kv, dtype);
    (normed && rotates && same && to == slot && served && heads == grouped::heads(&shape))
        .then_some(norms + 4)
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

    fn grouped(family: &str, head_dim: usize, dtype: Dtype) -> usize {
        let config = format!(
            r#"{{"model_type": "{family}", "vocab_size": 64, "hidden_size": 32,
            "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
            "head_dim": {head_dim}, "intermediate_size": 48, "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6}}"#
        );
        let config = model::config::parse(&config).expect("a config").config;
        let program = model::families::program(&config, false);
        let lowered = lower(&program, Mesh::SINGLE, Rank(0), 64).expect("one rank");
        let found = |at: usize| find_grouped(&lowered, &lowered.body[at..], dtype);
        let mut ops = Vec::new();
        let mut at = 0;
        while at < lowered.body.len() {
            let length = found(at);
            ops.extend(length);
            at += length.unwrap_or(1);
        }
        let expected = if family == "llama" { 4 } else { 6 };
        assert!(ops.iter().all(|length| *length == expected), "{family}: {ops:?}");
        ops.len()
    }

    #[test]
    fn grouped_attention_is_found_with_and_without_norms() {
        for family in ["qwen3", "llama"] {
            assert_eq!(grouped(family, 128, Dtype::Bf16), 3);
            assert_eq!(grouped(family, 64, Dtype::Bf16), 3);
            assert_eq!(grouped(family, 128, Dtype::F32), 0);
            assert_eq!(grouped(family, 32, Dtype::Bf16), 0);
        }
    }
}
