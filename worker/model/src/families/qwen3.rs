//! Qwen3 dense (2505.09388): as Llama, with normalised queries and keys and, in some layers, a
//! sliding window.

use super::layers::{GqaLayer, embedding, gqa, gqa_row, head, mlp, norm};
use crate::config::Qwen3;
use crate::program::{Builder, CacheKind, Extent, Program};

/// The program of a dense Qwen3.
pub(super) fn program(config: &Qwen3, expert_parallel: bool) -> Program {
    let decoder = &config.decoder;
    let eps = decoder.norm_eps;
    let mut p = Builder::new(decoder, expert_parallel);
    let full = config.windows.contains(&None).then(|| p.cache_group(CacheKind::Full));
    let window = config.windows.iter().flatten().next();
    let sliding = window.map(|&window| p.cache_group(CacheKind::Sliding { window }));
    let inner = Extent::new("intermediate_size", config.intermediate, 1);

    let x = embedding(&mut p, decoder);
    for (layer, &window) in config.windows.iter().enumerate() {
        let name = format!("model.layers.{layer}");
        let group = if window.is_some() { sliding } else { full };
        let slot = p.cache_row(group.unwrap_or_default(), gqa_row(&config.attention));
        let attention = GqaLayer {
            config: &config.attention,
            name: format!("{name}.self_attn"),
            slot,
            window,
            qk_norm: Some(eps),
        };
        let h = norm(&mut p, &x, &format!("{name}.input_layernorm"), eps);
        let attended = gqa(&mut p, &h, &attention);
        p.add(&x, &attended);
        let h = norm(&mut p, &x, &format!("{name}.post_attention_layernorm"), eps);
        let out = mlp(&mut p, &h, &format!("{name}.mlp"), inner, false);
        p.add(&x, &out);
    }
    head(p, decoder, &x)
}
