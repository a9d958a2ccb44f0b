//! Qwen3 with experts (2505.09388): the attention of the dense model, softmax-routed experts.

use super::layers::{GqaLayer, embedding, experts, gqa, gqa_row, head, mlp, norm};
use crate::config::Qwen3Moe;
use crate::program::{Builder, CacheKind, Extent, Program, Router, Scoring};

/// The program of a Qwen3 with experts.
pub(super) fn program(config: &Qwen3Moe, expert_parallel: bool) -> Program {
    let decoder = &config.decoder;
    let eps = decoder.norm_eps;
    let mut p = Builder::new(decoder, expert_parallel);
    let cache = p.cache_group(CacheKind::Full);
    let inner = Extent::new("intermediate_size", config.intermediate, 1);
    let expert = Extent::new("moe_intermediate_size", config.moe_intermediate, 1);
    let router = Router {
        experts: config.experts,
        top_k: config.top_k,
        scoring: Scoring::Softmax,
        limit: None,
        correction: None,
        norm_topk: config.norm_topk,
        scale: 1.0,
    };

    let x = embedding(&mut p, decoder);
    for (layer, &sparse) in config.sparse.iter().enumerate() {
        let name = format!("model.layers.{layer}");
        let slot = p.cache_row(cache, gqa_row(&config.attention));
        let attention = GqaLayer {
            config: &config.attention,
            name: format!("{name}.self_attn"),
            slot,
            window: None,
            qk_norm: Some(eps),
        };
        let h = norm(&mut p, &x, &format!("{name}.input_layernorm"), eps);
        let attended = gqa(&mut p, &h, &attention);
        p.add(&x, &attended);
        let h = norm(&mut p, &x, &format!("{name}.post_attention_layernorm"), eps);
        let mlp_name = format!("{name}.mlp");
        let out = if sparse {
            experts(&mut p, &h, &mlp_name, expert, router)
        } else {
            mlp(&mut p, &h, &mlp_name, inner, false)
        };
        p.add(&x, &out);
    }
    head(p, decoder, &x)
}
