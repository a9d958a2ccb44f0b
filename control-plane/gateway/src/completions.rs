//! `POST /v1/completions`: text or token prompts to text, whole or streamed.

use crate::choice::Delta;
use crate::error::ApiError;
use crate::generate::{Reply, StopValue, Usage, collect, reason, submit};
use crate::logprobs::{CompletionLogprobs, PromptEntry, prompt_logprobs};
use crate::request::RequestContext;
use crate::state::AppState;
use crate::stream::{self, Chunks, Frame};
use crate::{body, request, validate};
use axum::body::Body;
use axum::extract::{Extension, State};
use axum::http::Request;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

/// The door.
pub(crate) async fn completions(
    State(gateway): State<AppState>,
    Extension(context): Extension<RequestContext>,
    http: Request<Body>,
) -> Result<Response, ApiError> {
    let timeout = request::timeout(http.headers())?;
    let bytes = body::read(http, &gateway.limits).await?;
    let checked = request::check(&gateway, bytes, validate::completion).await?;
    let choices = submit(&checked, &gateway, &context, timeout)?;
    let streamed = checked.common.stream.is_some();
    let reply = Reply::new(format!("cmpl-{}", context.id), checked, gateway);
    if streamed {
        return stream::respond(choices, Completion::new(reply)).await;
    }
    let mut completion = Completion::new(reply);
    let choices: Vec<ChoiceJson> =
        collect(choices).await?.into_iter().map(|delta| completion.choice(delta)).collect();
    Ok(axum::Json(completion.json(choices, Some(completion.reply.usage()))).into_response())
}

/// A whole reply or one chunk of a stream; both have the same fields.
#[derive(Serialize)]
struct CompletionJson<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<ChoiceJson>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Serialize)]
struct ChoiceJson {
    index: usize,
    text: String,
    logprobs: Option<CompletionLogprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Vec<Option<PromptEntry>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
}

/// Writes deltas as completions.
struct Completion {
    reply: Reply,
    /// Per choice, characters of all tokens reported so far.
    offsets: Vec<usize>,
    /// Per prompt, what its first choice learnt about it.
    prompt_logprobs: Vec<Vec<step::Logprobs>>,
}

impl Completion {
    fn new(reply: Reply) -> Self {
        let prompts = reply.checked.prompts.len();
        let choices = prompts * reply.checked.common.n as usize;
        Self { reply, offsets: vec![0; choices], prompt_logprobs: vec![Vec::new(); prompts] }
    }

    fn json(&self, choices: Vec<ChoiceJson>, usage: Option<Usage>) -> CompletionJson<'_> {
        CompletionJson {
            id: &self.reply.id,
            object: "text_completion",
            created: self.reply.created,
            model: &self.reply.checked.model,
            choices,
            usage: usage.map(Some),
        }
    }

    /// The text that `echo` puts before an answer.
    fn echoed(&self, index: usize) -> String {
        let prompt = self.reply.prompt(index);
        match (&prompt.text, &self.reply.gateway.text.tokenizer) {
            (Some(text), _) => text.clone(),
            (None, Some(tokenizer)) => {
                tokenizer.decode(&prompt.tokens, self.reply.checked.common.skip_special)
            }
            (None, None) => String::new(),
        }
    }

    fn choice(&mut self, mut delta: Delta) -> ChoiceJson {
        self.reply.count(&delta);
        let n = self.reply.checked.common.n as usize;
        let (index, of_prompt) = (delta.index, delta.index / n);
        let opening = delta.opening.take();
        let opens = opening.is_some();
        if let Some(opening) = opening.filter(|opening| !opening.prompt_logprobs.is_empty()) {
            self.prompt_logprobs[of_prompt] = opening.prompt_logprobs;
        }
        let known = &self.prompt_logprobs[of_prompt];
        let echoes = opens && self.reply.checked.echo;
        let names = self.reply.names();
        let logprobs = self.reply.checked.logprobs.map(|count| {
            let mut list = CompletionLogprobs::default();
            let offset = &mut self.offsets[index];
            if echoes {
                let prompt = &self.reply.prompt(index).tokens;
                let of_tokens = std::iter::once(None).chain(known.iter().map(Some));
                for (token, logprobs) in prompt.iter().zip(of_tokens) {
                    list.push(*token, logprobs, count, names, offset);
                }
            }
            for token in &delta.tokens {
                list.push(token.token, token.logprobs.as_deref(), count, names, offset);
            }
            list
        });
        let prompt_logprobs = self
            .reply
            .checked
            .common
            .prompt_logprobs
            .filter(|_| opens)
            .map(|count| prompt_logprobs(known, count, names));
        let mut text = if echoes { self.echoed(index) } else { String::new() };
        text.push_str(&delta.text);
        ChoiceJson {
            index,
            text,
            logprobs,
            finish_reason: delta.finish.as_ref().map(|finish| reason(finish.reason)),
            stop_reason: delta.finish.as_ref().and_then(|finish| finish.stop_value()),
            prompt_logprobs,
            token_ids: self.reply.token_ids(&delta),
            prompt_token_ids: self.reply.prompt_token_ids(index).filter(|_| opens),
        }
    }
}

impl Chunks for Completion {
    fn reply(&self) -> &Reply {
        &self.reply
    }

    fn delta(&mut self, delta: Delta, frame: &mut Frame) {
        let options = self.reply.checked.common.stream.unwrap_or_default();
        let choice = self.choice(delta);
        let says_nothing = choice.text.is_empty()
            && choice.finish_reason.is_none()
            && choice.logprobs.is_none()
            && choice.token_ids.is_none();
        if says_nothing {
            return;
        }
        let usage = options.continuous.then(|| self.reply.usage());
        let mut json = self.json(vec![choice], usage);
        if options.include_usage && json.usage.is_none() {
            json.usage = Some(None);
        }
        frame.data(&json);
    }

    fn usage(&mut self, frame: &mut Frame) {
        frame.data(&self.json(Vec::new(), Some(self.reply.usage())));
    }
}
