//! The model authors' defaults of sampling, refused before anything starts where they are out of range.
//!
//! Ranges are those that requests are held to, by the same check. Invariant: a request that says
//! nothing about sampling is never refused for what its model's file says.

use step::{Sampling, SamplingError};
use text::GenerationConfig;

/// What a client may ask as `top_k`: 0 and -1 keep all tokens.
pub(super) const TOP_K: std::ops::RangeInclusive<i64> = -1..=i32::MAX as i64;

/// A default that no request could ask for.
#[derive(Debug, thiserror::Error)]
#[error("generation_config.json: {refusal}; correct the field or remove it")]
pub struct DefaultsError {
    refusal: SamplingError,
}

/// Checks the defaults of a model.
///
/// # Errors
/// The first field out of its range, with the range.
pub fn check_defaults(model: &GenerationConfig) -> Result<(), DefaultsError> {
    let refused = |param, allowed, got: &dyn ToString| DefaultsError {
        refusal: SamplingError { param, allowed, got: got.to_string() },
    };
    if let Some(top_k) = model.top_k.filter(|top_k| !TOP_K.contains(top_k)) {
        return Err(refused("top_k", "between -1 and 2147483647", &top_k));
    }
    if let Some(0) = model.max_new_tokens {
        return Err(refused("max_new_tokens", "at least 1", &0));
    }
    let neutral = Sampling::default();
    let sampling = Sampling {
        temperature: model.temperature.unwrap_or(neutral.temperature),
        top_p: model.top_p.unwrap_or(neutral.top_p),
        min_p: model.min_p.unwrap_or(neutral.min_p),
        repetition_penalty: model.repetition_penalty.unwrap_or(neutral.repetition_penalty),
        ..neutral
    };
    // Nothing in here is keyed by tokens.
    sampling.check(0).map_err(|refusal| DefaultsError { refusal })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn says(file: Value) -> Option<String> {
        let model = serde_json::from_value(file).expect("fields of the right type");
        check_defaults(&model).err().map(|error| error.to_string())
    }

    #[test]
    fn published_defaults_pass() {
        assert_eq!(says(json!({})), None);
        let published = json!({"temperature": 0.6, "top_k": -1, "top_p": 0.95, "min_p": 0.0,
            "repetition_penalty": 1.05, "max_new_tokens": 2048});
        assert_eq!(says(published), None);
    }

    #[test]
    fn every_default_out_of_range_is_refused_with_file_field_and_value() {
        for (field, value, shown) in [
            ("temperature", json!(-1), "-1"),
            ("temperature", json!(1e39), "inf"),
            ("top_p", json!(2), "2"),
            ("top_p", json!(0), "0"),
            ("top_k", json!(-2), "-2"),
            ("top_k", json!(4_294_967_296_i64), "4294967296"),
            ("min_p", json!(1.5), "1.5"),
            ("repetition_penalty", json!(0), "0"),
            ("max_new_tokens", json!(0), "0"),
        ] {
            let said = says(json!({field: value})).unwrap_or_else(|| panic!("{field} {shown}"));
            let start = format!("generation_config.json: {field} must be ");
            assert!(said.starts_with(&start) && said.contains(&format!("got {shown};")), "{said}");
        }
    }
}
