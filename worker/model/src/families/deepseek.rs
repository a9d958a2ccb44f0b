//! DeepSeek V2 (2405.04434) and V3 (2412.19437): latent attention, shared and routed experts.

use super::layers::{embedding, experts, head, mlp, norm, project, projection};
use crate::config::{DeepSeek, DeepSeekVersion, Mla};
use crate::program::{
    Attention, Builder, CacheKind, CacheSlot, Cut, Extent, GroupLimit, GroupScore, HeadSlice,
    Program, Router, Scoring, Value,
};

/// Epsilon of the norms on latents: the published code never passes the configured one.
const LATENT_EPS: f64 = 1e-6;

/// The program of a DeepSeek.
pub(super) fn program(config: &DeepSeek, expert_parallel: bool) -> Program {
    let decoder = &config.decoder;
    let mut p = Builder::new(decoder, expert_parallel);
    let cache = p.cache_group(CacheKind::Latent);
    let inner = Extent::new("intermediate_size", config.intermediate, 1);

    let x = embedding(&mut p, decoder);
    for layer in 0..decoder.layers {
        let name = format!("model.layers.{layer}");
        let row = vec![latent(&config.attention), rotated(&config.attention)];
        let slot = p.cache_row(cache, row);
        let h = norm(&mut p, &x, &format!("{name}.input_layernorm"), decoder.norm_eps);
        let attended = mla(&mut p, &h, &config.attention, &format!("{name}.self_attn"), slot);
        p.add(&x, &attended);
        let h = norm(&mut p, &x, &format!("{name}.post_attention_layernorm"), decoder.norm_eps);
        let mlp_name = format!("{name}.mlp");
        let out = if layer < config.dense_layers {
            mlp(&mut p, &h, &mlp_name, inner, false)
        } else {
            moe(&mut p, &h, config, &mlp_name)
        };
        p.add(&x, &out);
    }
    head(p, decoder, &x)
}

const fn latent(config: &Mla) -> Extent {
    Extent::new("kv_lora_rank", config.latent, 1)
}

const fn rotated(config: &Mla) -> Extent {
    Extent::new("qk_rope_head_dim", config.rope_dim, 1)
}

/// Multi-head latent attention; the result is a summand.
fn mla(p: &mut Builder, x: &Value, config: &Mla, name: &str, slot: CacheSlot) -> Value {
    let Mla { heads, nope, rope_dim, v, .. } = *config;
    let hidden = p.hidden();
    let heads_of = |each| Extent::new("num_attention_heads", heads, each);
    let q_heads = heads_of(nope + rope_dim);

    // Queries: straight from the stream, or through a latent of their own.
    let q = match config.q_lora {
        None => {
            let direct = projection(p, format!("{name}.q_proj"), q_heads, hidden, Cut::Out, false);
            project(p, "q", x, &[direct])
        }
        Some(rank) => {
            let rank = Extent::new("q_lora_rank", rank, 1);
            let down =
                projection(p, format!("{name}.q_a_proj"), rank, hidden, Cut::Whole, config.bias);
            let weight = p.vector(format!("{name}.q_a_layernorm.weight"), rank, Cut::Whole);
            let up = projection(p, format!("{name}.q_b_proj"), q_heads, rank, Cut::Out, false);
            let q_latent = project(p, "q latent", x, &[down]);
            let q_latent = p.norm(&q_latent, weight, LATENT_EPS);
            project(p, "q", &q_latent, &[up])
        }
    };
    let rotated_q =
        HeadSlice { heads: q_heads, offset: nope, width: rope_dim, stride: nope + rope_dim };
    p.rope(&q, &config.rope, rotated_q);

    // One latent and one rotated key for all heads, which is all that the cache keeps.
    let row = Extent::new("kv_lora_rank + qk_rope_head_dim", config.latent + rope_dim, 1);
    let kv_name = format!("{name}.kv_a_proj_with_mqa");
    let kv_a = projection(p, kv_name, row, hidden, Cut::Whole, config.bias);
    let kv = project(p, "latent", x, &[kv_a]);
    // One head that every rank holds.
    let one = Extent::new("latent", 1, row.total()).repeated();
    let weight = p.vector(format!("{name}.kv_a_layernorm.weight"), latent(config), Cut::Whole);
    let whole = HeadSlice { heads: one, offset: 0, width: config.latent, stride: row.total() };
    p.head_norm(&kv, weight, LATENT_EPS, whole);
    p.rope(&kv, &config.rope, HeadSlice { offset: config.latent, width: rope_dim, ..whole });
    p.write_kv(&kv, slot);

    let kv_b_name = format!("{name}.kv_b_proj.weight");
    let kv_b = p.matrix(kv_b_name, heads_of(nope + v), latent(config), Cut::Out);
    let scale = ((nope + rope_dim) as f64).powf(-0.5) * config.rope.softmax_factor();
    let attention = Attention::Mla {
        heads: heads_of(nope + rope_dim),
        nope,
        rope: rope_dim,
        v,
        latent: config.latent,
        scale,
        kv_b,
    };
    let attended = p.attention(&q, attention, slot);
    let output = projection(p, format!("{name}.o_proj"), hidden, heads_of(v), Cut::In, config.bias);
    project(p, "attention out", &attended, &[output])
}

/// Shared experts as one MLP, plus routed ones. Both are summands and are reduced once.
fn moe(p: &mut Builder, x: &Value, config: &DeepSeek, name: &str) -> Value {
    let all = Extent::new("n_routed_experts", config.experts, 1);
    let (scoring, score, correction) = match config.version {
        DeepSeekVersion::V2 => (Scoring::Softmax, GroupScore::Max, None),
        DeepSeekVersion::V3 => {
            let bias = format!("{name}.gate.e_score_correction_bias");
            (Scoring::Sigmoid, GroupScore::SumTop2, Some(p.vector(bias, all, Cut::Whole)))
        }
    };
    let router = Router {
        experts: config.experts,
        top_k: config.top_k,
        scoring,
        limit: config.groups.map(|(groups, chosen)| GroupLimit { groups, chosen, score }),
        correction,
        norm_topk: config.norm_topk,
        scale: config.routed_scale,
    };
    let expert = Extent::new("moe_intermediate_size", config.moe_intermediate, 1);
    let routed = experts(p, x, name, expert, router);
    if config.shared_experts == 0 {
        return routed;
    }
    let width = config.shared_experts * config.moe_intermediate;
    let shared = Extent::new("n_shared_experts x moe_intermediate_size", width, 1);
    let shared = mlp(p, x, &format!("{name}.shared_experts"), shared, false);
    p.add(&shared, &routed);
    shared
}
