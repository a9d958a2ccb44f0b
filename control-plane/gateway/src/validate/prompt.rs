//! The `prompt` of /v1/completions: text, texts, token ids, or lists of token ids.
//!
//! The shape is read off the first bytes, so no value is ever tried as several types.

use super::fields::{excerpt, typed};
use crate::error::ApiError;
use crate::limits::MAX_CHOICES;
use crate::state::Gateway;
use ids::TokenId;
use serde_json::value::RawValue;
use std::sync::Arc;

const PARAM: &str = "prompt";

/// One prompt: what the client sent, and its tokens.
#[derive(Clone, Debug)]
pub(crate) struct Prompt {
    /// At least one; all in the vocabulary; no more than the context holds.
    pub(crate) tokens: Arc<[TokenId]>,
    /// The text, where the client sent text.
    pub(crate) text: Option<String>,
}

/// All prompts of a request, in order; at least one.
pub(crate) fn parse(
    raw: Option<&str>,
    add_special: bool,
    gateway: &Gateway,
) -> Result<Vec<Prompt>, ApiError> {
    let empty = || ApiError::invalid(PARAM, "prompt must not be empty");
    let raw = raw.ok_or_else(|| ApiError::invalid(PARAM, "prompt is required"))?;
    let mut leading = raw.bytes().filter(|b| !b.is_ascii_whitespace());
    let prompts = match (leading.next(), leading.next()) {
        (Some(b'"'), _) => vec![text(raw, add_special, gateway)?],
        (Some(b'['), Some(b']')) => return Err(empty()),
        (Some(b'['), Some(b'"')) => {
            let items = list(raw)?;
            items.iter().map(|item| text(item, add_special, gateway)).collect::<Result<_, _>>()?
        }
        (Some(b'['), Some(b'[')) => {
            let items = list(raw)?;
            items.iter().map(|item| tokens(item, gateway)).collect::<Result<_, _>>()?
        }
        (Some(b'['), _) => vec![tokens(raw, gateway)?],
        _ => {
            let message = format!(
                "prompt must be a string, a list of strings, a list of token ids or a list of \
                 lists of token ids, got {}",
                excerpt(raw)
            );
            return Err(ApiError::invalid(PARAM, message));
        }
    };
    Ok(prompts)
}

/// The items of a list, untyped. A client cannot make many from few bytes: each is 16 bytes here
/// and the list is refused when it is longer than any request may be.
fn list(raw: &str) -> Result<Vec<&str>, ApiError> {
    let items: Vec<&RawValue> = serde_json::from_str(raw)
        .map_err(|error| ApiError::invalid(PARAM, format!("prompt is not valid: {error}")))?;
    if items.len() > MAX_CHOICES {
        let message = format!("prompt may hold at most {MAX_CHOICES} prompts, got {}", items.len());
        return Err(ApiError::invalid(PARAM, message));
    }
    Ok(items.into_iter().map(RawValue::get).collect())
}

fn text(raw: &str, add_special: bool, gateway: &Gateway) -> Result<Prompt, ApiError> {
    let text: String = typed(PARAM, raw, "a string")?;
    if text.is_empty() {
        return Err(ApiError::invalid(PARAM, "prompt must not be empty"));
    }
    let tokenizer = gateway.tokenizer(PARAM)?;
    super::context::check_text_length(&text, PARAM, gateway)?;
    let tokens = tokenizer
        .encode(&text, add_special)
        .map_err(|error| ApiError::invalid(PARAM, error.to_string()))?;
    Ok(Prompt { tokens: checked(tokens, gateway)?, text: Some(text) })
}

fn tokens(raw: &str, gateway: &Gateway) -> Result<Prompt, ApiError> {
    let expected = format!("token ids from 0 to {}", gateway.engine.limits().vocab - 1);
    let tokens: Vec<u32> = typed(PARAM, raw, &expected)?;
    let tokens = tokens.into_iter().map(TokenId).collect();
    Ok(Prompt { tokens: checked(tokens, gateway)?, text: None })
}

fn checked(tokens: Vec<TokenId>, gateway: &Gateway) -> Result<Arc<[TokenId]>, ApiError> {
    super::context::check_prompt(&tokens, PARAM, gateway)?;
    Ok(tokens.into())
}
