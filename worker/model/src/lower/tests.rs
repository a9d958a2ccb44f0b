//! Structure of lowered programs: disjoint buffers, collectives where placements ask for them.

use super::*;
use crate::config;
use crate::families;
use serde_json::{Value, json};

fn tiny(kind: &str) -> Value {
    let base = json!({
        "model_type": kind, "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 512
    });
    let extra = match kind {
        "llama" => json!({"num_key_value_heads": 2}),
        "qwen3" => json!({"num_key_value_heads": 2, "head_dim": 8}),
        "qwen3_moe" => json!({"num_key_value_heads": 2, "head_dim": 8, "num_experts": 8,
            "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
        _ => json!({"kv_lora_rank": 16, "q_lora_rank": 12, "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 8, "n_group": 2,
            "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1,
            "moe_intermediate_size": 16, "first_k_dense_replace": 1}),
    };
    let mut base = base;
    for (key, value) in extra.as_object().expect("object") {
        base[key] = value.clone();
    }
    base
}

const KINDS: [&str; 5] = ["llama", "qwen3", "qwen3_moe", "deepseek_v2", "deepseek_v3"];

fn lowered(kind: &str, mesh: Mesh, rank: usize) -> Result<Lowered, LowerError> {
    let config = config::parse(&tiny(kind).to_string()).expect("a tiny config").config;
    lower(&families::program(&config, mesh.expert_parallel), mesh, Rank(rank), 16)
}

fn meshes() -> [Mesh; 6] {
    let mesh = |dp, tp, expert_parallel| Mesh { dp, tp, expert_parallel };
    [
        Mesh::SINGLE,
        mesh(1, 2, false),
        mesh(1, 4, false),
        mesh(1, 2, true),
        mesh(2, 1, true),
        mesh(2, 2, true),
    ]
}

#[test]
fn buffers_alive_together_never_overlap() {
    for kind in KINDS {
        for mesh in meshes() {
            let low = lowered(kind, mesh, 0).expect(kind);
            for ops in [&low.body, &low.head] {
                check_disjoint(&low, ops);
                check_written_rows(&low, ops);
                check_activations(&low, ops);
                check_norms(&low, ops);
            }
        }
    }
}

/// A product and the activation of its results may be one launch: what it reads and what it writes lie
/// apart. Says how many there are.
fn check_activations(low: &Lowered, ops: &[Op]) -> usize {
    let mut found = 0;
    for pair in ops.windows(2) {
        let [Op::Linear { x, .. }, Op::SiluMul { out, .. }] = pair else { continue };
        assert!(are_apart(low, *x, *out), "{pair:?}");
        found += 1;
    }
    found
}

fn are_apart(low: &Lowered, a: BufferId, b: BufferId) -> bool {
    let [a, b] = [a, b].map(|id| &low.buffers[id.0]);
    a.offset + a.per_token() <= b.offset || b.offset + b.per_token() <= a.offset
}

/// A norm may be made by the product behind it, and by the sum over experts in front: neither stores where
/// the other reads.
fn check_norms(low: &Lowered, ops: &[Op]) {
    for pair in ops.windows(2) {
        match pair {
            [
                Op::Norm { x: from, out: normed, .. }
                | Op::AddNorm { residual: from, out: normed, .. },
                Op::Linear { x, out, .. },
            ] if normed == x => assert!(are_apart(low, *from, *out), "{pair:?}"),
            [Op::Add { x, target }, Op::AddNorm { delta, out, .. }] if target == delta => {
                assert!([x, target].iter().all(|id| are_apart(low, **id, *out)), "{pair:?}");
            }
            _ => {}
        }
    }
}

#[test]
fn what_a_product_reads_and_its_activation_writes_lie_apart() {
    // Three layers, of which experts take the place of two.
    for (kind, products) in [("llama", 3), ("qwen3", 3), ("deepseek_v2", 3)] {
        let low = lowered(kind, Mesh::SINGLE, 0).expect(kind);
        assert_eq!(check_activations(&low, &low.body), products, "{kind}");
    }
}

#[test]
fn projections_of_queries_and_keys_lie_side_by_side() {
    for (kind, pairs) in
        [("llama", 3), ("qwen3", 3), ("qwen3_moe", 3), ("deepseek_v2", 0), ("deepseek_v3", 0)]
    {
        // Two ranks cut widths, and a part of less than a vector has no place in wider rows.
        for (mesh, pairs) in [(Mesh::SINGLE, pairs), (Mesh { tp: 2, ..Mesh::SINGLE }, pairs)] {
            let low = lowered(kind, mesh, 0).expect(kind);
            assert_eq!(low.pairs.len(), pairs, "{kind} on {mesh:?}");
            for [first, second] in &low.pairs {
                let [first, second] = [first, second].map(|id| &low.buffers[id.0]);
                assert_eq!(first.offset + first.width, second.offset, "{first:?} and {second:?}");
            }
        }
    }
    // Queries straight from the stream are projected with the latent, those of a latent are not.
    let mut direct = tiny("deepseek_v2");
    direct["q_lora_rank"] = Value::Null;
    direct["qk_rope_head_dim"] = json!(8);
    let config = config::parse(&direct.to_string()).expect("a tiny config").config;
    let low = lower(&families::program(&config, false), Mesh::SINGLE, Rank(0), 16).expect("one");
    assert_eq!(low.pairs.len(), 3);
    check_disjoint(&low, &low.body);
    check_written_rows(&low, &low.body);
}

/// An attention may read the step's own keys where they lie: its result lies elsewhere. And every buffer
/// begins on 16 bytes, with one row as with any other number.
fn check_written_rows(low: &Lowered, ops: &[Op]) {
    let mut written = None;
    for op in ops {
        match op {
            Op::WriteKv { rows, .. } => written = Some(&low.buffers[rows.0]),
            Op::Attention { out, .. } => {
                let (kv, out) = (written.expect("keys in front"), &low.buffers[out.0]);
                let apart = kv.offset + kv.per_token() <= out.offset
                    || out.offset + out.per_token() <= kv.offset;
                assert!(apart, "{kv:?} and {out:?} in {op:?}");
            }
            _ => {}
        }
        if let Some(made) = op.uses().writes {
            assert_eq!(low.buffers[made.0].offset * 2 % 16, 0, "{:?}", low.buffers[made.0]);
        }
    }
}

/// Recomputes liveness backwards, independently of the planner.
fn check_disjoint(low: &Lowered, ops: &[Op]) {
    let mut live = vec![if ops == low.body { low.hidden } else { low.logits }];
    for op in ops.iter().rev() {
        let uses = op.uses();
        live.extend(uses.reads.iter().chain(&uses.writes));
        live.sort();
        live.dedup();
        for (i, a) in live.iter().enumerate() {
            for b in &live[i + 1..] {
                let (a, b) = (&low.buffers[a.0], &low.buffers[b.0]);
                let apart =
                    a.offset + a.per_token() <= b.offset || b.offset + b.per_token() <= a.offset;
                assert!(apart, "{a:?} and {b:?} are both alive in {op:?}");
            }
        }
        if let Some(made) = uses.writes {
            live.retain(|buffer| *buffer != made);
        }
    }
}

#[test]
fn one_rank_has_no_collective_and_two_have_what_the_paper_says() {
    let count = |low: &Lowered, name: &str| {
        low.body.iter().chain(&low.head).filter(|op| op.name() == name).count()
    };
    let names = ["all_reduce", "all_gather", "reduce_scatter"];
    for kind in KINDS {
        let single = lowered(kind, Mesh::SINGLE, 0).expect(kind);
        assert_eq!(names.map(|name| count(&single, name)), [0, 0, 0], "{kind}");
        let tp = lowered(kind, Mesh { dp: 1, tp: 2, expert_parallel: false }, 1).expect(kind);
        // The embedding, and attention and MLP of three layers; shared and routed experts share
        // one reduction; the logits are gathered.
        assert_eq!(names.map(|name| count(&tp, name)), [7, 1, 0], "{kind}");
    }
    // Attention on each shard's own tokens, experts on everyone's: two expert layers gather and
    // scatter over dp, whatever tp is.
    let dp = lowered("deepseek_v3", Mesh { dp: 2, tp: 1, expert_parallel: true }, 0).expect("dp");
    assert_eq!(names.map(|name| count(&dp, name)), [0, 2, 2]);
    let both =
        lowered("deepseek_v3", Mesh { dp: 2, tp: 2, expert_parallel: true }, 3).expect("2x2");
    assert_eq!(names.map(|name| count(&both, name)), [7, 3, 2]);
}

#[test]
fn residual_additions_are_fused_with_the_norm_that_follows() {
    let low = lowered("llama", Mesh::SINGLE, 0).expect("llama");
    let fused = low.body.iter().filter(|op| op.name() == "add_rms_norm").count();
    let plain = low.body.iter().filter(|op| op.name() == "rms_norm").count();
    assert_eq!((fused, plain), (6, 1));
    assert!(low.body.iter().all(|op| op.name() != "add"));
}

#[test]
fn the_ranks_of_a_mesh_cover_every_weight_exactly() {
    for kind in KINDS {
        let single = lowered(kind, Mesh::SINGLE, 0).expect(kind);
        for mesh in meshes() {
            let ranks: Vec<_> =
                (0..mesh.world()).map(|rank| lowered(kind, mesh, rank).expect(kind)).collect();
            for (id, whole) in single.weights.iter().enumerate() {
                let whole = whole.as_ref().expect("one rank holds everything");
                let parts = ranks.iter().filter_map(|rank| rank.weights[id].as_ref());
                let held: usize = parts.clone().map(|part| part.region.elements()).sum();
                let copies = parts.clone().next().map_or(0, |part| part.copies);
                assert_eq!(held, copies * whole.region.elements(), "{kind} {}", whole.name);
                assert!(parts.clone().all(|part| part.name == whole.name));
            }
        }
    }
}

#[test]
fn a_mesh_that_does_not_divide_the_heads_is_refused_with_those_that_do() {
    let refused = lowered("llama", Mesh { dp: 1, tp: 3, expert_parallel: false }, 0);
    let text = refused.expect_err("4 heads over 3 ranks").to_string();
    assert!(text.contains("tp may be 1, 2, 4"), "{text}");
    // Two key-value heads over four ranks are repeated, and the cache row shows it.
    let four =
        lowered("llama", Mesh { dp: 1, tp: 4, expert_parallel: false }, 3).expect("repeated");
    assert_eq!(four.groups[0].layers[1].width, 2 * 8);
    let refused = lowered("qwen3_moe", Mesh { dp: 3, tp: 1, expert_parallel: true }, 0);
    assert_eq!(refused, Err(LowerError::Experts { experts: 8, ranks: 3 }));
}
