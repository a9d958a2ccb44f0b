//! Planted faults: an engine that gets one thing wrong is far outside of the tolerance, so the
//! agreement that `families` shows is not for want of sensitivity.

mod common;

use common::{Model, Setup, families, greedy, naive, prompt};
use engine::{WeightError, WeightSource};
use ops::{Matrix, WeightSlice};
use serde_json::{Value, json};
use std::borrow::Cow;
use weights::Weights;

/// Fifty times the tolerance of parity.
const VISIBLE: f64 = 50.0 * 2e-3;

/// Weights of which one is multiplied by a factor.
struct Scaled {
    weights: &'static Weights,
    name: &'static str,
    values: Vec<f32>,
}

impl Scaled {
    fn new(weights: &'static Weights, name: &'static str, factor: f32) -> &'static Self {
        let values = weights.get(name).expect("a weight").data.to_f32();
        let values = values.into_iter().map(|x| x * factor).collect();
        Box::leak(Box::new(Self { weights, name, values }))
    }
}

impl WeightSource for Scaled {
    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix<'_>, WeightError> {
        if name == self.name {
            return Ok(Matrix::new(WeightSlice::F32(&self.values), rows, cols));
        }
        self.weights.matrix(name, rows, cols)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Cow<'_, [f32]>, WeightError> {
        if name == self.name {
            return Ok(Cow::Borrowed(&self.values));
        }
        self.weights.vector(name, len)
    }
}

/// The worst difference of prompt log-probabilities between an engine on `faulty` (over `weights`,
/// or its own) and the naive model on `right`.
fn error(right: &Model, faulty: &Model, weights: Option<&'static dyn WeightSource>) -> f64 {
    let tokens = prompt(150, 4);
    let weights = weights.unwrap_or(right.weights);
    let got = faulty.session_over(weights, Setup::default()).complete(&tokens, 1024, 1, greedy());
    let expected = naive::logprobs(&right.config, right.weights, &tokens);
    let off =
        |(at, got): (usize, &f32)| (expected[at][tokens[at + 1] as usize] - f64::from(*got)).abs();
    got.prompt.iter().enumerate().map(off).fold(0.0, f64::max)
}

fn config(name: &str) -> Value {
    families().into_iter().find(|(family, _)| *family == name).expect("a family").1
}

#[test]
fn a_wrong_configuration_is_visible() {
    let faults = [
        ("llama", "/rope_theta", json!(500.0)),
        ("llama", "/rope_scaling/factor", json!(2.0)),
        ("qwen3, sliding", "/sliding_window", json!(60)),
        ("qwen3_moe", "/norm_topk_prob", json!(false)),
        ("qwen3_moe", "/num_experts_per_tok", json!(2)),
        ("deepseek_v2", "/rope_scaling/mscale_all_dim", json!(0.0)),
        ("deepseek_v2", "/rope_scaling/factor", json!(1.0)),
        ("deepseek_v2, groups", "/topk_method", json!("greedy")),
        ("deepseek_v2, groups", "/routed_scaling_factor", json!(1.0)),
        ("deepseek_v3", "/rope_interleave", json!(false)),
        ("deepseek_v3", "/n_group", json!(1)),
        ("deepseek_v3", "/n_shared_experts", json!(0)),
        ("deepseek_v3", "/norm_topk_prob", json!(false)),
    ];
    for (family, field, value) in faults {
        let right = config(family);
        let mut wrong = right.clone();
        match wrong.pointer_mut(field) {
            Some(place) => *place = value,
            None => wrong[&field[1..]] = value,
        }
        if field == "/n_group" {
            wrong["topk_group"] = json!(1);
        }
        let right = Model::new(&right, 11);
        let off = error(&right, &Model::new(&wrong, 11), None);
        assert!(off > VISIBLE, "{family}: {field} shows only as {off}");
    }
}

#[test]
fn a_wrong_weight_is_visible() {
    let faults = [
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias", 0.0),
        ("deepseek_v3", "model.layers.2.self_attn.kv_a_layernorm.weight", 0.8),
        ("qwen3", "model.layers.1.self_attn.k_norm.weight", 0.8),
        ("llama, biases, tied", "model.layers.1.self_attn.v_proj.bias", 0.0),
    ];
    for (family, name, factor) in faults {
        let right = Model::new(&config(family), 11);
        let off = error(&right, &right, Some(Scaled::new(right.weights, name, factor)));
        assert!(off > VISIBLE, "{family}: {name} shows only as {off}");
    }
}
