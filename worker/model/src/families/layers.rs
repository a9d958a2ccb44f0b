//! Layers that families share: embedding and head, grouped-query attention, the gated MLP, experts.

use crate::config::{Decoder, Gqa};
use crate::program::{
    Attention, Builder, CacheSlot, Cut, Extent, HeadSlice, NodeOp, Program, Router, Value, WeightId,
};

/// Rows of the embedding table and of the head.
fn vocabulary(decoder: &Decoder) -> Extent {
    Extent::new("vocab_size", decoder.vocab, 1)
}

/// Token ids to the residual stream.
pub(super) fn embedding(p: &mut Builder, decoder: &Decoder) -> Value {
    let table = embedding_table(p, decoder);
    p.embed(table)
}

fn embedding_table(p: &mut Builder, decoder: &Decoder) -> WeightId {
    let hidden = p.hidden();
    p.matrix("model.embed_tokens.weight".into(), vocabulary(decoder), hidden, Cut::Out)
}

/// Final norm and projection onto the vocabulary.
pub(super) fn head(mut p: Builder, decoder: &Decoder, x: &Value) -> Program {
    let normed = norm(&mut p, x, "model.norm", decoder.norm_eps);
    let hidden = p.hidden();
    let head = if decoder.tied {
        embedding_table(&mut p, decoder)
    } else {
        p.matrix("lm_head.weight".into(), vocabulary(decoder), hidden, Cut::Out)
    };
    p.finish(&normed, head)
}

/// RMS norm of the residual stream.
pub(super) fn norm(p: &mut Builder, x: &Value, name: &str, eps: f64) -> Value {
    let hidden = p.hidden();
    let weight = p.vector(format!("{name}.weight"), hidden, Cut::Whole);
    p.norm(x, weight, eps)
}

/// A projection with its bias, if it has one.
pub(super) struct Projection {
    pub(super) weight: WeightId,
    pub(super) bias: Option<WeightId>,
}

/// Declares `name.weight` and, with `bias`, `name.bias`.
pub(super) fn projection(
    p: &mut Builder,
    name: String,
    out: Extent,
    input: Extent,
    cut: Cut,
    bias: bool,
) -> Projection {
    let bias_cut = if cut == Cut::In { Cut::First } else { cut };
    let bias = bias.then(|| p.vector(format!("{name}.bias"), out, bias_cut));
    Projection { weight: p.matrix(format!("{name}.weight"), out, input, cut), bias }
}

/// Projections of the same input, side by side.
pub(super) fn project(
    p: &mut Builder,
    name: &'static str,
    x: &Value,
    parts: &[Projection],
) -> Value {
    let weights: Vec<_> = parts.iter().map(|part| part.weight).collect();
    let biases: Vec<_> = parts.iter().filter_map(|part| part.bias).collect();
    p.linear(name, x, &weights, &biases)
}

/// Where grouped-query attention differs between families and layers.
pub(super) struct GqaLayer<'a> {
    pub(super) config: &'a Gqa,
    /// `model.layers.N.self_attn`
    pub(super) name: String,
    pub(super) slot: CacheSlot,
    pub(super) window: Option<usize>,
    /// The epsilon of query and key norms, in families that have them.
    pub(super) qk_norm: Option<f64>,
}

/// The parts of a cache row of grouped-query attention: keys, then values.
pub(super) fn gqa_row(config: &Gqa) -> Vec<Extent> {
    vec![kv_heads(config), kv_heads(config)]
}

const fn kv_heads(config: &Gqa) -> Extent {
    Extent::new("num_key_value_heads", config.kv_heads, config.head_dim).repeated()
}

/// Grouped-query attention; the result is a summand.
pub(super) fn gqa(p: &mut Builder, x: &Value, layer: &GqaLayer<'_>) -> Value {
    let GqaLayer { config, name, slot, window, qk_norm } = layer;
    let (hidden, head_dim) = (p.hidden(), config.head_dim);
    let q_heads = Extent::new("num_attention_heads", config.heads, head_dim);
    let kv_heads = kv_heads(config);
    let cut_out = |p: &mut Builder, which: &str, out| {
        projection(p, format!("{name}.{which}_proj"), out, hidden, Cut::Out, config.bias)
    };
    let query = cut_out(p, "q", q_heads);
    let key = cut_out(p, "k", kv_heads);
    let value = cut_out(p, "v", kv_heads);
    let q = project(p, "q", x, &[query]);
    let kv = project(p, "kv", x, &[key, value]);

    let of = |heads| HeadSlice { heads, offset: 0, width: head_dim, stride: head_dim };
    if let Some(eps) = *qk_norm {
        let width = Extent::new("head_dim", head_dim, 1);
        let q_norm = p.vector(format!("{name}.q_norm.weight"), width, Cut::Whole);
        let k_norm = p.vector(format!("{name}.k_norm.weight"), width, Cut::Whole);
        p.head_norm(&q, q_norm, eps, of(q_heads));
        p.head_norm(&kv, k_norm, eps, of(kv_heads));
    }
    p.rope(&q, &config.rope, of(q_heads));
    p.rope(&kv, &config.rope, of(kv_heads));
    p.write_kv(&kv, *slot);
    let scale = (head_dim as f64).powf(-0.5);
    let attention = Attention::Gqa { heads: q_heads, kv_heads, head_dim, scale, window: *window };
    let attended = p.attention(&q, attention, *slot);
    let output = projection(p, format!("{name}.o_proj"), hidden, q_heads, Cut::In, config.bias);
    project(p, "attention out", &attended, &[output])
}

/// `down(silu(gate x) * up x)`; the result is a summand.
pub(super) fn mlp(p: &mut Builder, x: &Value, name: &str, inner: Extent, bias: bool) -> Value {
    let hidden = p.hidden();
    let gate = projection(p, format!("{name}.gate_proj"), inner, hidden, Cut::Out, bias);
    let up = projection(p, format!("{name}.up_proj"), inner, hidden, Cut::Out, bias);
    let down = projection(p, format!("{name}.down_proj"), hidden, inner, Cut::In, bias);
    let gate_up = project(p, "gate up", x, &[gate, up]);
    let activated = p.silu_mul(&gate_up);
    project(p, "mlp out", &activated, &[down])
}

/// Routed experts under `name` (`model.layers.N.mlp`); the result is a summand.
pub(super) fn experts(
    p: &mut Builder,
    x: &Value,
    name: &str,
    inner: Extent,
    router: Router,
) -> Value {
    let hidden = p.hidden();
    let x = p.for_experts(x);
    let all = Extent::new("experts", router.experts, 1);
    let gate = p.matrix(format!("{name}.gate.weight"), all, hidden, Cut::Whole);
    let logits = p.linear("router logits", &x, &[gate], &[]);
    p.route(&logits, router);
    let of = router.experts;
    let (mut gates, mut ups, mut downs) = (Vec::new(), Vec::new(), Vec::new());
    for index in 0..of {
        let (out, input) = if p.expert_parallel() {
            (Cut::Expert { index, of }, Cut::Expert { index, of })
        } else {
            (Cut::Out, Cut::In)
        };
        let name = format!("{name}.experts.{index}");
        gates.push(p.matrix(format!("{name}.gate_proj.weight"), inner, hidden, out));
        ups.push(p.matrix(format!("{name}.up_proj.weight"), inner, hidden, out));
        downs.push(p.matrix(format!("{name}.down_proj.weight"), hidden, inner, input));
    }
    let op = NodeOp::Experts {
        experts: of,
        top_k: router.top_k,
        intermediate: inner,
        gate: gates,
        up: ups,
        down: downs,
    };
    p.experts(&x, op)
}
