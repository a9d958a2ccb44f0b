//! The `messages` of a chat: roles from a closed set, content as text or text parts.

use super::fields::{Fields, typed};
use crate::error::ApiError;
use crate::limits::{MAX_CONTENT_PARTS, MAX_MESSAGES};
use serde_json::value::RawValue;
use text::{ChatMessage, Role};

const PARAM: &str = "messages";

/// All messages, in order; at least one.
pub(crate) fn parse(raw: Option<&str>) -> Result<Vec<ChatMessage>, ApiError> {
    let raw = raw.ok_or_else(|| ApiError::invalid(PARAM, "messages is required"))?;
    let messages = items(PARAM.to_owned(), raw, MAX_MESSAGES, "a list of messages")?;
    if messages.is_empty() {
        return Err(ApiError::invalid(PARAM, "messages must not be empty"));
    }
    messages.into_iter().enumerate().map(|(i, raw)| message(i, raw)).collect()
}

fn items<'a>(
    param: String,
    raw: &'a str,
    max: usize,
    expected: &str,
) -> Result<Vec<&'a str>, ApiError> {
    let items: Vec<&'a RawValue> = serde_json::from_str(raw)
        .map_err(|_| ApiError::invalid(param.clone(), format!("{param} must be {expected}")))?;
    if items.len() > max {
        let message = format!("{param} may hold at most {max} entries, got {}", items.len());
        return Err(ApiError::invalid(param, message));
    }
    Ok(items.into_iter().map(RawValue::get).collect())
}

fn message(index: usize, raw: &str) -> Result<ChatMessage, ApiError> {
    let at = |field: &str| format!("messages[{index}].{field}");
    let not_object = |_| {
        let param = format!("messages[{index}]");
        ApiError::invalid(param.clone(), format!("{param} must be an object with role and content"))
    };
    let mut fields = Fields::parse(raw.as_bytes()).map_err(not_object)?;
    let mut string = |name: &str| {
        fields.raw(name).map(|raw| typed::<String>(at(name), raw, "a string")).transpose()
    };
    let role = string("role")?;
    let name = string("name")?;
    let reasoning = match string("reasoning_content")? {
        None => string("reasoning")?,
        some => some,
    };
    let role = match role.as_deref() {
        Some("tool" | "function") => {
            let message = "messages of tools are not supported here";
            return Err(ApiError::unsupported(at("role"), message));
        }
        role => role.and_then(Role::parse).ok_or_else(|| {
            let message = format!(
                "{} must be one of system, developer, user, assistant, got {}",
                at("role"),
                role.unwrap_or("nothing")
            );
            ApiError::invalid(at("role"), message)
        })?,
    };
    for unsupported in ["tool_calls", "function_call", "audio"] {
        if fields.raw(unsupported).is_some_and(|raw| raw != "[]") {
            let param = at(unsupported);
            let message = format!("{param} is not supported here");
            return Err(ApiError::unsupported(param, message));
        }
    }
    let content = match fields.raw("content") {
        Some(raw) => content(&at("content"), raw)?,
        // An assistant's turn may have said nothing.
        None if role == Role::Assistant => String::new(),
        None => {
            return Err(ApiError::invalid(at("content"), format!("{} is required", at("content"))));
        }
    };
    Ok(ChatMessage { role, content, name, reasoning })
}

/// A string, or text parts joined by line breaks.
fn content(param: &str, raw: &str) -> Result<String, ApiError> {
    if raw.starts_with('"') {
        return typed(param.to_owned(), raw, "a string");
    }
    let parts = items(param.to_owned(), raw, MAX_CONTENT_PARTS, "a string or a list of parts")?;
    let texts = parts.into_iter().enumerate().map(|(i, raw)| part(format!("{param}[{i}]"), raw));
    Ok(texts.collect::<Result<Vec<String>, _>>()?.join("\n"))
}

fn part(param: String, raw: &str) -> Result<String, ApiError> {
    let mut fields = Fields::parse(raw.as_bytes()).map_err(|_| {
        ApiError::invalid(param.clone(), format!("{param} must be an object with type and text"))
    })?;
    let kind: Option<String> = fields
        .raw("type")
        .map(|raw| typed(format!("{param}.type"), raw, "a string"))
        .transpose()?;
    match kind.as_deref() {
        Some("text" | "input_text" | "output_text" | "refusal") => {
            let field = if kind.as_deref() == Some("refusal") { "refusal" } else { "text" };
            let raw = fields.raw(field);
            let missing = || ApiError::invalid(format!("{param}.{field}"), "text is required");
            typed(format!("{param}.{field}"), raw.ok_or_else(missing)?, "a string")
        }
        other => {
            let kind = other.unwrap_or("nothing").to_owned();
            let message = format!("{param}.type must be text; {kind:?} is not supported here");
            Err(ApiError::unsupported(param, message))
        }
    }
}
