//! Whether prompt and answer fit the model's context, and how long the answer may be.

use crate::error::ApiError;
use crate::state::Gateway;
use axum::http::StatusCode;
use ids::{TokenId, Tokens};

/// Refuses a text that cannot fit however it is tokenised, before that work is done.
pub(crate) fn check_text_length(
    text: &str,
    param: &'static str,
    gateway: &Gateway,
) -> Result<(), ApiError> {
    let longest = gateway.text.tokenizer.as_ref().map_or(usize::MAX, |t| t.longest_token());
    let at_least = text.len() / longest;
    let max = gateway.engine.limits().max_context.as_usize();
    if at_least > max {
        return Err(exceeded(param, max, format!("at least {at_least} tokens in the prompt")));
    }
    Ok(())
}

/// Refuses a prompt that is empty, outside of the vocabulary or longer than the context.
pub(crate) fn check_prompt(
    tokens: &[TokenId],
    param: &'static str,
    gateway: &Gateway,
) -> Result<(), ApiError> {
    let limits = gateway.engine.limits();
    if tokens.is_empty() {
        return Err(ApiError::invalid(param, format!("{param} must not be empty")));
    }
    if let Some(token) = tokens.iter().find(|token| token.0 >= limits.vocab) {
        let message =
            format!("{param} must hold token ids from 0 to {}, got {token}", limits.vocab - 1);
        return Err(ApiError::invalid(param, message));
    }
    let max = limits.max_context.as_usize();
    if tokens.len() > max {
        return Err(exceeded(param, max, format!("{} tokens in the prompt", tokens.len())));
    }
    Ok(())
}

/// How many tokens to generate after a prompt of `prompt` tokens, which fits. `asked` is the
/// client's own number; `default` holds where there is none and is cut to what is left.
pub(crate) fn answer_length(
    prompt: usize,
    asked: Option<u32>,
    default: Option<u32>,
    param: &'static str,
    gateway: &Gateway,
) -> Result<Tokens, ApiError> {
    let max = gateway.engine.limits().max_context.as_usize();
    let left = max.saturating_sub(prompt);
    match asked {
        Some(asked) if asked as usize > left => {
            let requested = prompt + asked as usize;
            let detail =
                format!("{requested} tokens ({prompt} in the prompt, {asked} for the completion)");
            Err(exceeded(param, max, detail))
        }
        Some(asked) => Ok(Tokens(asked)),
        None => {
            let left = u32::try_from(left).unwrap_or(u32::MAX);
            Ok(Tokens(default.unwrap_or(left).min(left)))
        }
    }
}

fn exceeded(param: &'static str, max: usize, requested: String) -> ApiError {
    let message = format!(
        "this model's maximum context length is {max} tokens; the request has {requested}; \
         shorten the prompt or ask for fewer tokens"
    );
    ApiError::new(StatusCode::BAD_REQUEST, "context_length_exceeded", message).with_param(param)
}
