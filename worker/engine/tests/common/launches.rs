//! Which kernels ran: the names that launches resolved to, and what they must be for a shape.
//!
//! Nothing is listed twice: names come from the launches themselves. Kernels for any shape have `any`
//! in their names, those for head dimensions of published models begin as [`MADE_FOR_HEADS`] says.

use super::Model;
use engine::Engine;
use model::config::ModelConfig;
use std::collections::{BTreeMap, BTreeSet};

/// How the names of kernels begin that are made for the head dimensions of published models.
const MADE_FOR_HEADS: [&str; 2] = ["mla_", "gqa_"];

/// Names of kernels.
pub type Names = BTreeSet<String>;

/// What an engine launched until now.
pub struct Before(BTreeMap<String, u64>);

impl Before {
    pub fn of(engine: &Engine<'_>) -> Self {
        Self(engine.launches().into_iter().collect())
    }

    /// What it launched since.
    pub fn since(&self, engine: &Engine<'_>) -> Names {
        let launched = engine.launches().into_iter();
        let new = launched.filter(|(name, count)| self.0.get(name) != Some(count));
        new.map(|(name, _)| name).collect()
    }
}

fn begin<'a>(names: &'a Names, with: &[&str]) -> Vec<&'a str> {
    let found = names.iter().filter(|name| with.iter().any(|with| name.starts_with(with)));
    found.map(String::as_str).collect()
}

/// Steps of a model with native head dimensions in bf16: whole prompts and decodes. Products of widths
/// that are no multiple of 8, which no published model has, may run on kernels for any.
pub fn are_production(names: &Names, model: &Model, what: &str) {
    let config = &model.config;
    let mut inputs = model.specs.iter().filter_map(|spec| spec.shape.get(1));
    let odd = inputs.any(|inputs| inputs % 8 != 0);
    let any = names.iter().filter(|name| name.contains("_any"));
    let any: Vec<_> = any.filter(|name| !odd || !name.starts_with("linear_")).collect();
    assert!(any.is_empty(), "{what}: kernels for any shape ran: {any:?}");
    let has = |prefix: &str| {
        assert!(!begin(names, &[prefix]).is_empty(), "{what}: no {prefix} among {names:?}");
    };
    match config {
        ModelConfig::DeepSeek(_) => {
            has("mla_prompt");
            // One or two rows of short contexts take one launch, others three.
            if begin(names, &["mla_near"]).is_empty() {
                ["mla_prepare", "mla_decode", "mla_values"].into_iter().for_each(has);
            }
        }
        ModelConfig::Qwen3(qwen) if qwen.windows.iter().any(Option::is_some) => {
            let attention = begin(names, &["gqa_", "attention_mma"]);
            assert!(!attention.is_empty(), "{what}: no attention among {names:?}");
        }
        _ => has("gqa_decode_fused_"),
    }
    if matches!(config, ModelConfig::DeepSeek(_) | ModelConfig::Qwen3Moe(_)) {
        has("moe_stream");
        let experts = begin(names, &["experts_wide", "experts_many"]);
        assert!(!experts.is_empty(), "{what}: no experts of many tokens among {names:?}");
    }
}

/// Steps of a model in 32-bit floats: kernels for any shape, of whatever the model's are.
pub fn are_generic(names: &Names, what: &str) {
    for op in ["attention_", "linear_"] {
        let of = begin(names, &[op]);
        let any = !of.is_empty() && of.iter().all(|name| name.contains("_any"));
        assert!(any, "{what}: {of:?} among {names:?}");
    }
    are_not_made_for_heads(names, what);
}

/// Steps of a model whose head dimensions are nobody's.
pub fn are_not_made_for_heads(names: &Names, what: &str) {
    let special = begin(names, &MADE_FOR_HEADS);
    assert!(special.is_empty(), "{what}: {special:?} ran on other head dimensions");
}
