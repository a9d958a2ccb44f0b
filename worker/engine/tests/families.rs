//! Every family against an independent f64 model: prompt and output, through the paged cache.

mod common;

use common::{Model, Setup, families, greedy, naive, prompt};
use engine::KvDtype;

/// f32 against f64 over three layers.
const TOLERANCE: f64 = 5e-4;

#[test]
fn log_probabilities_agree_with_the_naive_model() {
    common::agreement::every_family_agrees(Setup::default(), TOLERANCE);
}

#[test]
fn log_probabilities_spread_over_the_vocabulary() {
    // Otherwise the tolerance above would prove little.
    for (name, config) in families() {
        let model = Model::new(&config, 11);
        let rows = naive::logprobs(&model.config, model.weights, &prompt(20, 3));
        let row = rows.last().expect("rows");
        let mean = row.iter().sum::<f64>() / row.len() as f64;
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / row.len() as f64;
        assert!(variance.sqrt() >= 1.0, "{name}: standard deviation {}", variance.sqrt());
    }
}

#[test]
fn a_bf16_cache_is_close() {
    for (name, config) in families() {
        let model = Model::new(&config, 5);
        let tokens = prompt(100, 1);
        let setup = Setup { kv_dtype: KvDtype::Bf16, ..Setup::default() };
        let half = model.session(setup).complete(&tokens, 1024, 1, greedy());
        let whole = model.session(Setup::default()).complete(&tokens, 1024, 1, greedy());
        let mean = half.prompt.iter().zip(&whole.prompt).map(|(a, b)| (a - b).abs()).sum::<f32>()
            / whole.prompt.len() as f32;
        assert!(mean > 0.0 && mean < 0.05, "{name}: {mean}");
    }
}
