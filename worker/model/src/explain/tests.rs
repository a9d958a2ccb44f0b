//! The table says what the lowering decided: published shapes, bytes of collectives, folding.

use super::*;
use crate::lower::lower;
use crate::mesh::Rank;
use crate::{config, families};

/// DeepSeek-V2-Lite as published.
const LITE: &str = r#"{"model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048,
    "num_hidden_layers": 27, "num_attention_heads": 16, "kv_lora_rank": 512, "q_lora_rank": null,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64,
    "num_experts_per_tok": 6, "n_shared_experts": 2, "moe_intermediate_size": 1408,
    "intermediate_size": 10944, "first_k_dense_replace": 1, "max_position_embeddings": 163840}"#;

fn lite(mesh: Mesh) -> Lowered {
    let config = config::parse(LITE).expect("published").config;
    let program = families::program(&config, mesh.expert_parallel);
    lower(&program, mesh, Rank(0), 32).expect("16 heads divide")
}

const BF16: Storage = Storage { weight: 2, cache: 2 };

#[test]
fn a_published_shape_has_its_published_size() {
    let low = lite(Mesh::SINGLE);
    let elements: usize = low.weights.iter().flatten().map(|w| w.region.elements()).sum();
    // 15.7 billion parameters, as the paper says.
    assert_eq!(elements, 15_706_484_224);
    // 576 elements a token and layer.
    assert_eq!(block_bytes(&low.groups[0], 2), Bytes(27 * 64 * 576 * 2));
    let text = explain(&low, BF16, |op| format!("k_{}", op.name()));
    assert!(text.contains("repeat 25 times"), "{text}");
    assert!(text.contains("  mla            k_mla "), "{text}");
    assert!(text.lines().count() < 70, "{text}");
    assert!(!text.contains("collectives"), "{text}");
}

#[test]
fn collectives_are_listed_with_their_bytes() {
    let tp = Mesh { dp: 1, tp: 4, expert_parallel: false };
    let low = lite(tp);
    let reduces = low.body.iter().filter(|op| op.name() == "all_reduce").count();
    assert_eq!(reduces, 1 + 2 * 27);
    let text = explain(&low, BF16, |op| format!("k_{}", op.name()));
    // A ring all-reduce sends 2 (n - 1) / n of [32, 2048] floats; the logits are gathered once.
    let reduce = 2 * 32 * 2048 * 4 * 3 / 4;
    let gather = 32 * 102_400 * 4 * 3 / 4;
    let total = reduces * reduce + gather;
    assert!(
        text.contains(&format!("{total:>16} bytes sent a step ({} ops)", reduces + 1)),
        "{text}"
    );
}
