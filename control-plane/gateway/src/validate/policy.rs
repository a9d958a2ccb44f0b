//! What becomes of fields that no check asked for: the declared table.
//!
//! A field whose loss would change what a client gets is refused unless its value asks for nothing.
//! One whose loss cannot be noticed is ignored. Fields that nobody declared are ignored too, as
//! other servers do, and counted.

use super::fields::{Fields, excerpt};
use crate::error::ApiError;
use telemetry::{Door, Metrics};

/// Accepted without effect.
pub(crate) const IGNORED: &[&str] = &[
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "verbosity",
    "parallel_tool_calls",
    "spaces_between_special_tokens",
    "request_id",
];

/// Refused unless the value, written in JSON without spaces, is one of these (null always is).
pub(crate) const REFUSED: &[(&str, &[&str])] = &[
    ("tools", &["[]"]),
    ("tool_choice", &["\"none\"", "\"auto\""]),
    ("functions", &["[]"]),
    ("function_call", &["\"none\"", "\"auto\""]),
    ("response_format", &["{\"type\":\"text\"}"]),
    ("structured_outputs", &[]),
    ("structural_tag", &[]),
    ("guided_json", &[]),
    ("guided_regex", &[]),
    ("guided_choice", &[]),
    ("guided_grammar", &[]),
    ("guided_decoding_backend", &[]),
    ("guided_whitespace_pattern", &[]),
    ("regex", &[]),
    ("ebnf", &[]),
    ("json_schema", &[]),
    ("chat_template", &[]),
    ("documents", &["[]"]),
    ("audio", &[]),
    ("modalities", &["[\"text\"]"]),
    ("prediction", &[]),
    ("moderation", &[]),
    ("web_search_options", &[]),
    ("continue_final_message", &["false"]),
    ("thinking_token_budget", &[]),
    ("use_beam_search", &["false"]),
    ("length_penalty", &["1", "1.0"]),
    ("early_stopping", &["false"]),
    ("bad_words", &["[]"]),
    ("allowed_token_ids", &[]),
    ("logits_processors", &["[]"]),
    ("logprob_token_ids", &["[]"]),
    ("truncate_prompt_tokens", &[]),
    ("prompt_embeds", &[]),
    ("mm_processor_kwargs", &["{}"]),
    ("kv_transfer_params", &["{}"]),
    ("add_special_tokens", &["false"]),
    ("suffix", &["\"\""]),
    ("best_of", &["1"]),
    ("echo", &["false"]),
    ("prompt", &[]),
    ("messages", &[]),
    ("max_completion_tokens", &[]),
    ("top_logprobs", &["0"]),
    ("chat_template_kwargs", &["{}"]),
];

/// Judges what is left of a request after its door took what it knows.
///
/// # Errors
/// 400 for the first field, by name, whose loss would change the result.
pub(crate) fn judge(fields: Fields<'_>, door: Door, metrics: &Metrics) -> Result<(), ApiError> {
    let mut unknown = 0;
    for (name, value) in fields.rest() {
        let refused = REFUSED.iter().find(|(refused, _)| *refused == name);
        let Some((name, neutral)) = refused else {
            unknown += u64::from(!IGNORED.contains(&name.as_str()));
            continue;
        };
        let compact: String = value.chars().filter(|c| !c.is_ascii_whitespace()).collect();
        if compact != "null" && !neutral.contains(&compact.as_str()) {
            let message = format!(
                "{name} is not supported here, so {} would have no effect; leave it out",
                excerpt(value)
            );
            return Err(ApiError::unsupported(*name, message));
        }
    }
    metrics.unknown_fields(door).inc_by(unknown);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_declared_field_has_one_entry() {
        let mut names: Vec<&str> = REFUSED.iter().map(|(name, _)| *name).collect();
        names.extend(IGNORED);
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn a_value_that_asks_for_nothing_passes_and_unknown_fields_are_counted() {
        let metrics = Metrics::new("m", "1");
        let judge = |body: &str| {
            let fields = Fields::parse(body.as_bytes()).expect("valid");
            super::judge(fields, Door::Chat, &metrics).map_err(|e| e.param)
        };
        let neutral = r#"{"tools": [], "response_format": { "type": "text" }, "suffix": null}"#;
        assert_eq!(judge(neutral), Ok(()));
        assert_eq!(judge(r#"{"metadata": {}, "no_such_field": [1]}"#), Ok(()));
        assert_eq!(metrics.unknown_fields(Door::Chat).get(), 1);
        for (name, _) in REFUSED {
            assert_eq!(judge(&format!("{{\"{name}\": [{{}}]}}")), Err(Some((*name).into())));
        }
    }
}
