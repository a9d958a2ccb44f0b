//! Fields that every generating door shares, checked once.
//!
//! What the client leaves out comes from the model's generation_config.json, then from OpenAI's
//! defaults. Ranges of single sampling parameters are [`Sampling::check`]'s; this file bounds lists
//! and says how fields depend on each other.

use super::defaults::TOP_K;
use super::fields::{Fields, typed};
use crate::error::ApiError;
use crate::limits::{
    MAX_LOGIT_BIAS, MAX_N, MAX_PROMPT_LOGPROB_ENTRIES, MAX_SALT_BYTES, MAX_STOP_BYTES,
    MAX_STOP_STRINGS, MAX_STOP_TOKENS,
};
use crate::state::Gateway;
use ids::{TokenId, Tokens};
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use std::collections::BTreeMap;
use std::sync::Arc;
use step::{MAX_LOGPROBS, Sampling};
use text::StopStrings;

/// Temperatures below this are greedy: dividing logits by less says nothing in f32.
const GREEDY_BELOW: f32 = 1e-5;

/// How a stream reports usage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct StreamOptions {
    /// A last chunk without choices carries the usage.
    pub(crate) include_usage: bool,
    /// Every chunk carries the usage so far.
    pub(crate) continuous: bool,
}

/// What a client asked of its generations, whatever door it came through.
#[derive(Clone, Debug)]
pub(crate) struct Common {
    pub(crate) n: u32,
    pub(crate) max_tokens: Option<u32>,
    /// Of choice 0, without log-probabilities.
    pub(crate) sampling: Sampling,
    /// Ends generation: the client's and the model's. Sorted.
    pub(crate) stop_token_ids: Arc<[TokenId]>,
    /// The client's alone, which are reported when they ended an answer.
    pub(crate) own_stop_token_ids: Arc<[TokenId]>,
    pub(crate) stop: StopStrings,
    pub(crate) include_stop: bool,
    pub(crate) skip_special: bool,
    pub(crate) prompt_logprobs: Option<u8>,
    pub(crate) return_token_ids: bool,
    pub(crate) tokens_as_ids: bool,
    pub(crate) stream: Option<StreamOptions>,
    pub(crate) priority: i32,
    pub(crate) cache_salt: Option<Arc<str>>,
    pub(crate) user: Option<Arc<str>>,
}

/// Takes the shared fields. `max_tokens` names the door's field for it, in order of precedence.
pub(crate) fn parse(
    fields: &mut Fields<'_>,
    max_tokens: &[&'static str],
    gateway: &Gateway,
) -> Result<Common, ApiError> {
    let mut asked = None;
    for name in max_tokens {
        let value = fields.integer(name, 0..=i64::from(u32::MAX / 2))?;
        asked = asked.or(value.map(|value| value as u32));
    }
    let ignore_eos = fields.flag("ignore_eos")?;
    let own_stop_token_ids = stop_tokens(fields, gateway)?;
    let mut all = own_stop_token_ids.to_vec();
    if !ignore_eos {
        all.extend_from_slice(&gateway.text.ends);
    }
    all.sort_unstable();
    all.dedup();
    let stop_token_ids: Arc<[TokenId]> = all.into();
    let sampling = sampling(fields, &stop_token_ids, gateway)?;
    Ok(Common {
        n: fields.integer("n", 1..=MAX_N)?.unwrap_or(1) as u32,
        max_tokens: asked,
        sampling,
        stop_token_ids,
        own_stop_token_ids,
        stop: stop_strings(fields, gateway)?,
        include_stop: fields.flag("include_stop_str_in_output")?,
        skip_special: fields.take("skip_special_tokens", "true or false")?.unwrap_or(true),
        prompt_logprobs: alternatives(fields, "prompt_logprobs")?,
        return_token_ids: fields.flag("return_token_ids")?,
        tokens_as_ids: fields.flag("return_tokens_as_token_ids")?,
        stream: stream(fields)?,
        priority: fields
            .integer("priority", i64::from(i32::MIN)..=i64::from(i32::MAX))?
            .unwrap_or(0) as i32,
        cache_salt: cache_salt(fields)?,
        user: fields.take::<String>("user", "a string")?.map(Arc::from),
    })
}

/// A number of alternatives beside a token.
pub(crate) fn alternatives(
    fields: &mut Fields<'_>,
    name: &'static str,
) -> Result<Option<u8>, ApiError> {
    Ok(fields.integer(name, 0..=i64::from(MAX_LOGPROBS))?.map(|value| value as u8))
}

impl Common {
    /// Checks what depends on a prompt's length: `max_tokens` resolved, and all prompts' tokens.
    pub(crate) fn check_lengths(
        &self,
        resolved: Tokens,
        zero_allowed: bool,
        param: &'static str,
    ) -> Result<(), ApiError> {
        if self.max_tokens == Some(0) && !zero_allowed {
            let message = format!("{param} must be at least 1, got 0");
            return Err(ApiError::invalid(param, message));
        }
        if self.sampling.min_tokens > resolved {
            let message = format!(
                "min_tokens must be at most {param}, got {} and {resolved}",
                self.sampling.min_tokens
            );
            return Err(ApiError::invalid("min_tokens", message));
        }
        Ok(())
    }
}

/// Refuses log-probabilities of prompts that would make a reply too large.
pub(crate) fn check_reply_size(
    alternatives: u8,
    prompt_tokens: usize,
    param: &'static str,
) -> Result<(), ApiError> {
    let entries = prompt_tokens.saturating_mul(usize::from(alternatives) + 1);
    if entries > MAX_PROMPT_LOGPROB_ENTRIES {
        let message = format!(
            "{param} with {alternatives} alternatives over {prompt_tokens} prompt tokens would \
             make {entries} entries; at most {MAX_PROMPT_LOGPROB_ENTRIES} fit one reply"
        );
        return Err(ApiError::invalid(param, message));
    }
    Ok(())
}

fn sampling(
    fields: &mut Fields<'_>,
    stop_token_ids: &Arc<[TokenId]>,
    gateway: &Gateway,
) -> Result<Sampling, ApiError> {
    let model = &gateway.text.generation;
    let temperature = fields.number("temperature")?.or(model.temperature).unwrap_or(1.0);
    let top_k = fields.integer("top_k", TOP_K)?.or(model.top_k).unwrap_or(0);
    let min_tokens = fields.integer("min_tokens", 0..=i64::from(u32::MAX / 2))?.unwrap_or(0);
    let seed = fields.integer("seed", i64::MIN..=i64::MAX)?;
    let sampling = Sampling {
        temperature: if (0.0..GREEDY_BELOW).contains(&temperature) { 0.0 } else { temperature },
        top_k: u32::try_from(top_k).unwrap_or(0),
        top_p: fields.number("top_p")?.or(model.top_p).unwrap_or(1.0),
        min_p: fields.number("min_p")?.or(model.min_p).unwrap_or(0.0),
        seed: seed.map_or_else(|| gateway.draw_seed(), |seed| seed as u64),
        choice: 0,
        repetition_penalty: fields
            .number("repetition_penalty")?
            .or(model.repetition_penalty)
            .unwrap_or(1.0),
        presence_penalty: fields.number("presence_penalty")?.unwrap_or(0.0),
        frequency_penalty: fields.number("frequency_penalty")?.unwrap_or(0.0),
        logit_bias: logit_bias(fields, gateway)?,
        min_tokens: Tokens(min_tokens as u32),
        banned_before_min: if min_tokens > 0 { Arc::clone(stop_token_ids) } else { Arc::default() },
        logprobs: None,
    };
    sampling
        .check(gateway.engine.limits().vocab)
        .map_err(|error| ApiError::invalid(error.param, error.to_string()))?;
    Ok(sampling)
}

fn stop_tokens(fields: &mut Fields<'_>, gateway: &Gateway) -> Result<Arc<[TokenId]>, ApiError> {
    const PARAM: &str = "stop_token_ids";
    let vocab = gateway.engine.limits().vocab;
    let expected = format!("a list of token ids from 0 to {}", vocab - 1);
    let mut tokens: Vec<u32> = fields.take(PARAM, &expected)?.unwrap_or_default();
    if tokens.len() > MAX_STOP_TOKENS {
        let message = format!("{PARAM} may hold at most {MAX_STOP_TOKENS}, got {}", tokens.len());
        return Err(ApiError::invalid(PARAM, message));
    }
    if let Some(token) = tokens.iter().find(|token| **token >= vocab) {
        return Err(ApiError::invalid(PARAM, format!("{PARAM} must be {expected}, got {token}")));
    }
    tokens.sort_unstable();
    tokens.dedup();
    Ok(tokens.into_iter().map(TokenId).collect())
}

fn stop_strings(fields: &mut Fields<'_>, gateway: &Gateway) -> Result<StopStrings, ApiError> {
    const PARAM: &str = "stop";
    let Some(raw) = fields.raw(PARAM) else { return Ok(StopStrings::default()) };
    let strings: Vec<String> = if raw.starts_with('"') {
        vec![typed(PARAM, raw, "a string or a list of strings")?]
    } else {
        typed(PARAM, raw, "a string or a list of strings")?
    };
    if strings.is_empty() {
        return Ok(StopStrings::default());
    }
    if strings.len() > MAX_STOP_STRINGS {
        let message = format!("stop may hold at most {MAX_STOP_STRINGS}, got {}", strings.len());
        return Err(ApiError::invalid(PARAM, message));
    }
    for stop in &strings {
        if stop.is_empty() || stop.len() > MAX_STOP_BYTES {
            let message = format!(
                "each stop string must have 1 to {MAX_STOP_BYTES} bytes, got {}",
                stop.len()
            );
            return Err(ApiError::invalid(PARAM, message));
        }
    }
    // Without a tokenizer there is no text that a string could be found in.
    gateway.tokenizer(PARAM)?;
    Ok(StopStrings::new(&strings))
}

fn logit_bias(
    fields: &mut Fields<'_>,
    gateway: &Gateway,
) -> Result<Arc<[(TokenId, f32)]>, ApiError> {
    struct Biases(BTreeMap<u32, f32>);

    impl<'de> serde::Deserialize<'de> for Biases {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct Entries;
            impl<'de> Visitor<'de> for Entries {
                type Value = Biases;

                fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                    f.write_str("an object")
                }

                fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Biases, A::Error> {
                    let mut biases = BTreeMap::new();
                    while let Some((token, bias)) = map.next_entry::<String, f32>()? {
                        let token = token.parse::<u32>().map_err(|_| {
                            A::Error::custom(format_args!("{token:?} is no token id"))
                        })?;
                        biases.insert(token, bias);
                        if biases.len() > MAX_LOGIT_BIAS {
                            let error = format_args!("more than {MAX_LOGIT_BIAS} entries");
                            return Err(A::Error::custom(error));
                        }
                    }
                    Ok(Biases(biases))
                }
            }
            deserializer.deserialize_map(Entries)
        }
    }

    let expected = format!(
        "an object of at most {MAX_LOGIT_BIAS} entries from token ids below {} to numbers \
         between -100 and 100",
        gateway.engine.limits().vocab
    );
    let biases: Option<Biases> = fields.take("logit_bias", &expected)?;
    let biases = biases.map(|Biases(map)| map).unwrap_or_default();
    Ok(biases.into_iter().map(|(token, bias)| (TokenId(token), bias)).collect())
}

fn stream(fields: &mut Fields<'_>) -> Result<Option<StreamOptions>, ApiError> {
    const PARAM: &str = "stream_options";
    let stream = fields.flag("stream")?;
    let Some(raw) = fields.raw(PARAM) else {
        return Ok(stream.then(StreamOptions::default));
    };
    if !stream {
        return Err(ApiError::invalid(PARAM, "stream_options needs stream to be true"));
    }
    let mut options = Fields::parse(raw.as_bytes())
        .map_err(|_| ApiError::invalid(PARAM, "stream_options must be an object"))?;
    Ok(Some(StreamOptions {
        include_usage: options.flag("include_usage")?,
        continuous: options.flag("continuous_usage_stats")?,
    }))
}

fn cache_salt(fields: &mut Fields<'_>) -> Result<Option<Arc<str>>, ApiError> {
    const PARAM: &str = "cache_salt";
    let Some(salt) = fields.take::<String>(PARAM, "a string")? else { return Ok(None) };
    let allowed = |c: char| !c.is_control() && !matches!(c, '/' | '\\' | '@');
    if salt.is_empty() || salt.len() > MAX_SALT_BYTES || !salt.chars().all(allowed) {
        let message = format!(
            "cache_salt must have 1 to {MAX_SALT_BYTES} bytes without control characters, /, \\ and @"
        );
        return Err(ApiError::invalid(PARAM, message));
    }
    Ok(Some(salt.into()))
}
