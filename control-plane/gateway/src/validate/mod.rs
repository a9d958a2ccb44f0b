//! The one place where requests are checked, for every door.
//!
//! A door hands in a body and gets a typed request or the error to send; no door checks anything
//! itself. What passes here is safe to submit: tokens are in the vocabulary, lengths fit, numbers
//! are finite and in range. Order: JSON, then the model, then fields, then what depends on several.

pub(crate) mod context;
mod defaults;
pub(crate) mod fields;
pub(crate) mod messages;
pub(crate) mod policy;
pub(crate) mod prompt;
pub(crate) mod sampling;

pub use defaults::{DefaultsError, check_defaults};

use crate::error::ApiError;
use crate::limits::MAX_CHOICES;
use crate::state::Gateway;
use fields::Fields;
use ids::{TokenId, Tokens};
use prompt::Prompt;
use sampling::Common;
use telemetry::Door;
use text::{ChatMessage, TemplateError, TemplateOptions};

/// Tokens that /v1/completions generates when nothing else is said, as OpenAI documents.
const COMPLETION_DEFAULT_TOKENS: u32 = 16;

/// A request whose prompts are tokens and whose every field is in range.
#[derive(Clone, Debug)]
pub(crate) struct Checked {
    pub(crate) model: String,
    /// Each with the tokens to generate after it.
    pub(crate) prompts: Vec<(Prompt, Tokens)>,
    pub(crate) common: Common,
    /// Alternatives beside each generated token.
    pub(crate) logprobs: Option<u8>,
    /// Alternatives beside each prompt token, as the engine is asked for them.
    pub(crate) prompt_logprobs: Option<u8>,
    /// The prompt is part of the text.
    pub(crate) echo: bool,
}

fn model(fields: &mut Fields<'_>, gateway: &Gateway) -> Result<String, ApiError> {
    gateway.model_name(fields.take("model", "a string")?)
}

/// A request of /v1/completions.
pub(crate) fn completion(body: &[u8], gateway: &Gateway) -> Result<Checked, ApiError> {
    const MAX_TOKENS: &str = "max_tokens";
    let mut fields = Fields::parse(body)?;
    let model = model(&mut fields, gateway)?;
    let raw_prompt = fields.raw("prompt");
    let add_special = fields.take("add_special_tokens", "true or false")?.unwrap_or(true);
    let echo = fields.flag("echo")?;
    let logprobs = sampling::alternatives(&mut fields, "logprobs")?;
    let common = sampling::parse(&mut fields, &[MAX_TOKENS], gateway)?;
    if let Some(best_of) = fields.integer("best_of", 1..=crate::limits::MAX_N)?
        && best_of != i64::from(common.n)
    {
        let message = format!("best_of must equal n, got {best_of} and {}", common.n);
        return Err(ApiError::unsupported("best_of", message));
    }
    policy::judge(fields, Door::Completions, &gateway.metrics)?;
    if common.prompt_logprobs.is_some() && common.stream.is_some() {
        let message = "prompt_logprobs cannot be streamed; leave out stream";
        return Err(ApiError::invalid("prompt_logprobs", message));
    }

    let prompts = prompt::parse(raw_prompt, add_special, gateway)?;
    let choices = prompts.len().saturating_mul(common.n as usize);
    if choices > MAX_CHOICES {
        let message = format!("prompts times n may be at most {MAX_CHOICES}, got {choices}");
        return Err(ApiError::invalid("n", message));
    }
    let prompt_logprobs =
        if echo { common.prompt_logprobs.max(logprobs) } else { common.prompt_logprobs };
    if let Some(alternatives) = prompt_logprobs {
        let tokens: usize = prompts.iter().map(|prompt| prompt.tokens.len()).sum();
        let param = if common.prompt_logprobs.is_some() { "prompt_logprobs" } else { "logprobs" };
        sampling::check_reply_size(alternatives, tokens * common.n as usize, param)?;
    }
    let default = gateway.text.generation.max_new_tokens.unwrap_or(COMPLETION_DEFAULT_TOKENS);
    let zero_allowed = echo || prompt_logprobs.is_some();
    let prompts = prompts
        .into_iter()
        .map(|prompt| {
            let length = prompt.tokens.len();
            let max = context::answer_length(
                length,
                common.max_tokens,
                Some(default),
                "prompt",
                gateway,
            )?;
            common.check_lengths(max, zero_allowed, MAX_TOKENS)?;
            Ok((prompt, max))
        })
        .collect::<Result<_, ApiError>>()?;
    Ok(Checked { model, prompts, common, logprobs, prompt_logprobs, echo })
}

/// A request of /v1/chat/completions.
pub(crate) fn chat(body: &[u8], gateway: &Gateway) -> Result<Checked, ApiError> {
    const MAX_TOKENS: &str = "max_completion_tokens";
    let mut fields = Fields::parse(body)?;
    let model = model(&mut fields, gateway)?;
    let messages = messages::parse(fields.raw("messages"))?;
    let options = template_options(&mut fields)?;
    let wants_logprobs = fields.flag("logprobs")?;
    let top_logprobs = sampling::alternatives(&mut fields, "top_logprobs")?;
    let logprobs = match (wants_logprobs, top_logprobs) {
        (false, None | Some(0)) => None,
        (false, Some(_)) => {
            let message = "top_logprobs needs logprobs to be true";
            return Err(ApiError::invalid("top_logprobs", message));
        }
        (true, alternatives) => Some(alternatives.unwrap_or(0)),
    };
    let common = sampling::parse(&mut fields, &[MAX_TOKENS, "max_tokens"], gateway)?;
    policy::judge(fields, Door::Chat, &gateway.metrics)?;
    if common.prompt_logprobs.is_some() && common.stream.is_some() {
        let message = "prompt_logprobs cannot be streamed; leave out stream";
        return Err(ApiError::invalid("prompt_logprobs", message));
    }

    let tokens = chat_tokens(&messages, &options, gateway)?;
    if let Some(alternatives) = common.prompt_logprobs {
        let entries = tokens.len() * common.n as usize;
        sampling::check_reply_size(alternatives, entries, "prompt_logprobs")?;
    }
    let max = context::answer_length(
        tokens.len(),
        common.max_tokens,
        gateway.text.generation.max_new_tokens,
        "messages",
        gateway,
    )?;
    common.check_lengths(max, false, MAX_TOKENS)?;
    let prompt_logprobs = common.prompt_logprobs;
    let prompt = Prompt { tokens: tokens.into(), text: None };
    let prompts = vec![(prompt, max)];
    Ok(Checked { model, prompts, common, logprobs, prompt_logprobs, echo: false })
}

fn template_options(fields: &mut Fields<'_>) -> Result<TemplateOptions, ApiError> {
    let mut options = TemplateOptions {
        add_generation_prompt: fields
            .take("add_generation_prompt", "true or false")?
            .unwrap_or(true),
        kwargs: fields.take("chat_template_kwargs", "an object")?.unwrap_or_default(),
    };
    // Templates of reasoning models read it as a variable; others do not notice.
    if let Some(effort) = fields.take::<String>("reasoning_effort", "a string")? {
        options.kwargs.entry("reasoning_effort").or_insert(effort.into());
    }
    Ok(options)
}

fn chat_tokens(
    messages: &[ChatMessage],
    options: &TemplateOptions,
    gateway: &Gateway,
) -> Result<Vec<TokenId>, ApiError> {
    const PARAM: &str = "messages";
    let tokenizer = gateway.tokenizer(PARAM)?;
    let template = gateway.text.template.as_ref().ok_or_else(|| {
        ApiError::unsupported(PARAM, "this model has no chat template; use /v1/completions")
    })?;
    for message in messages {
        context::check_text_length(&message.content, PARAM, gateway)?;
    }
    let rendered = template.render(tokenizer, messages, options).map_err(|error| {
        let param = match error {
            TemplateError::ReservedVariable(_) => "chat_template_kwargs",
            _ => PARAM,
        };
        ApiError::invalid(param, error.to_string())
    })?;
    let tokens = tokenizer
        .encode_chat(&rendered)
        .map_err(|error| ApiError::invalid(PARAM, error.to_string()))?;
    context::check_prompt(&tokens, PARAM, gateway)?;
    Ok(tokens)
}

/// A request of /tokenize.
pub(crate) struct Tokenize {
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) return_strings: bool,
}

/// A request of /tokenize: of a `prompt` or of `messages`.
pub(crate) fn tokenize(body: &[u8], gateway: &Gateway) -> Result<Tokenize, ApiError> {
    let mut fields = Fields::parse(body)?;
    model(&mut fields, gateway)?;
    let add_special: Option<bool> = fields.take("add_special_tokens", "true or false")?;
    let return_strings = fields.flag("return_token_strs")?;
    let tokens = match (fields.take::<String>("prompt", "a string")?, fields.raw("messages")) {
        (Some(_), Some(_)) => {
            return Err(ApiError::invalid("messages", "send either prompt or messages"));
        }
        (None, None) => return Err(ApiError::invalid("prompt", "prompt is required")),
        (Some(text), None) => {
            let tokenizer = gateway.tokenizer("prompt")?;
            tokenizer
                .encode(&text, add_special.unwrap_or(true))
                .map_err(|error| ApiError::invalid("prompt", error.to_string()))?
        }
        (None, Some(raw)) => {
            if add_special == Some(true) {
                let message = "the chat template writes its own special tokens";
                return Err(ApiError::unsupported("add_special_tokens", message));
            }
            let messages = messages::parse(Some(raw))?;
            let options = template_options(&mut fields)?;
            chat_tokens(&messages, &options, gateway)?
        }
    };
    policy::judge(fields, Door::Tokenize, &gateway.metrics)?;
    Ok(Tokenize { tokens, return_strings })
}

/// A request of /detokenize.
pub(crate) fn detokenize(body: &[u8], gateway: &Gateway) -> Result<Vec<TokenId>, ApiError> {
    const PARAM: &str = "tokens";
    let mut fields = Fields::parse(body)?;
    model(&mut fields, gateway)?;
    let expected = format!("a list of token ids from 0 to {}", gateway.engine.limits().vocab - 1);
    let tokens: Vec<u32> = fields
        .take(PARAM, &expected)?
        .ok_or_else(|| ApiError::invalid(PARAM, "tokens is required"))?;
    policy::judge(fields, Door::Detokenize, &gateway.metrics)?;
    let tokens: Vec<TokenId> = tokens.into_iter().map(TokenId).collect();
    let vocab = gateway.engine.limits().vocab;
    if let Some(token) = tokens.iter().find(|token| token.0 >= vocab) {
        return Err(ApiError::invalid(PARAM, format!("tokens must be {expected}, got {token}")));
    }
    Ok(tokens)
}
