//! Llama 3 (2407.21783): pre-norm decoder, grouped-query attention, gated MLP.

use super::layers::{GqaLayer, embedding, gqa, gqa_row, head, mlp, norm};
use crate::config::Llama;
use crate::program::{Builder, CacheKind, Extent, Program};

/// The program of a Llama.
pub(super) fn program(config: &Llama, expert_parallel: bool) -> Program {
    let decoder = &config.decoder;
    let mut p = Builder::new(decoder, expert_parallel);
    let cache = p.cache_group(CacheKind::Full);
    let inner = Extent::new("intermediate_size", config.intermediate, 1);

    let x = embedding(&mut p, decoder);
    for layer in 0..decoder.layers {
        let name = format!("model.layers.{layer}");
        let slot = p.cache_row(cache, gqa_row(&config.attention));
        let attention = GqaLayer {
            config: &config.attention,
            name: format!("{name}.self_attn"),
            slot,
            window: None,
            qk_norm: None,
        };
        let h = norm(&mut p, &x, &format!("{name}.input_layernorm"), decoder.norm_eps);
        let attended = gqa(&mut p, &h, &attention);
        p.add(&x, &attended);
        let h = norm(&mut p, &x, &format!("{name}.post_attention_layernorm"), decoder.norm_eps);
        let out = mlp(&mut p, &h, &format!("{name}.mlp"), inner, config.mlp_bias);
        p.add(&x, &out);
    }
    head(p, decoder, &x)
}
