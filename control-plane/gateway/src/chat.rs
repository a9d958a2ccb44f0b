//! `POST /v1/chat/completions`: messages to an answer, whole or streamed.

use crate::choice::Delta;
use crate::error::ApiError;
use crate::generate::{Reply, StopValue, Usage, collect, reason, submit};
use crate::logprobs::{ChatLogprobs, PromptEntry, prompt_logprobs};
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
pub(crate) async fn chat_completions(
    State(gateway): State<AppState>,
    Extension(context): Extension<RequestContext>,
    http: Request<Body>,
) -> Result<Response, ApiError> {
    let timeout = request::timeout(http.headers())?;
    let bytes = body::read(http, &gateway.limits).await?;
    let checked = request::check(&gateway, bytes, validate::chat).await?;
    let choices = submit(&checked, &gateway, &context, timeout)?;
    let streamed = checked.common.stream.is_some();
    let mut chat = Chat { reply: Reply::new(format!("chatcmpl-{}", context.id), checked, gateway) };
    if streamed {
        return stream::respond(choices, chat).await;
    }
    let deltas = collect(choices).await?;
    Ok(axum::Json(chat.whole(deltas)).into_response())
}

#[derive(Serialize)]
struct ChatJson<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<WholeChoice>,
    usage: Usage,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Vec<Option<PromptEntry>>>,
}

#[derive(Serialize)]
struct WholeChoice {
    index: usize,
    message: Message,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
}

#[derive(Serialize)]
struct Message {
    role: &'static str,
    content: String,
    refusal: Option<()>,
}

#[derive(Serialize)]
struct ChunkJson<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<ChunkChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Serialize, Default)]
struct ChunkChoice {
    index: usize,
    delta: ChunkDelta,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<StopValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
}

#[derive(Serialize, Default)]
struct ChunkDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

const ASSISTANT: &str = "assistant";

/// Writes deltas as chat completions.
struct Chat {
    reply: Reply,
}

impl Chat {
    fn logprobs(&self, delta: &Delta) -> Option<ChatLogprobs> {
        let count = self.reply.checked.logprobs?;
        let mut list = ChatLogprobs::default();
        for logprobs in delta.tokens.iter().filter_map(|token| token.logprobs.as_deref()) {
            list.push(logprobs, count, self.reply.names());
        }
        Some(list)
    }

    fn whole(&mut self, deltas: Vec<Delta>) -> ChatJson<'_> {
        deltas.iter().for_each(|delta| self.reply.count(delta));
        let reply = &self.reply;
        let opening = deltas.first().and_then(|delta| delta.opening.as_ref());
        let prompt_logprobs =
            reply.checked.common.prompt_logprobs.zip(opening).map(|(count, known)| {
                prompt_logprobs(&known.prompt_logprobs, count, reply.names())
            });
        let choices = deltas.into_iter().map(|delta| WholeChoice {
            index: delta.index,
            logprobs: self.logprobs(&delta),
            finish_reason: delta.finish.as_ref().map(|finish| reason(finish.reason)),
            stop_reason: delta.finish.as_ref().and_then(|finish| finish.stop_value()),
            token_ids: reply.token_ids(&delta),
            prompt_token_ids: reply.prompt_token_ids(delta.index),
            message: Message { role: ASSISTANT, content: delta.text, refusal: None },
        });
        ChatJson {
            choices: choices.collect(),
            id: &reply.id,
            object: "chat.completion",
            created: reply.created,
            model: &reply.checked.model,
            usage: reply.usage(),
            prompt_logprobs,
        }
    }

    fn chunk(&self, choices: Vec<ChunkChoice>, usage: Option<Option<Usage>>) -> ChunkJson<'_> {
        ChunkJson {
            id: &self.reply.id,
            object: "chat.completion.chunk",
            created: self.reply.created,
            model: &self.reply.checked.model,
            choices,
            usage,
        }
    }

    /// A chunk with one choice and what the client wants to hear of usage beside it.
    fn send(&self, choice: ChunkChoice, frame: &mut Frame) {
        let options = self.reply.checked.common.stream.unwrap_or_default();
        let usage = if options.continuous {
            Some(Some(self.reply.usage()))
        } else {
            options.include_usage.then_some(None)
        };
        frame.data(&self.chunk(vec![choice], usage));
    }
}

impl Chunks for Chat {
    fn reply(&self) -> &Reply {
        &self.reply
    }

    fn delta(&mut self, delta: Delta, frame: &mut Frame) {
        self.reply.count(&delta);
        let index = delta.index;
        if delta.opening.is_some() {
            let role = ChunkDelta { role: Some(ASSISTANT), content: Some(String::new()) };
            let prompt_token_ids = self.reply.prompt_token_ids(index);
            let choice = ChunkChoice { index, delta: role, prompt_token_ids, ..Default::default() };
            self.send(choice, frame);
        }
        let logprobs = self.logprobs(&delta);
        let token_ids = self.reply.token_ids(&delta);
        let reports_tokens =
            !delta.tokens.is_empty() && (logprobs.is_some() || token_ids.is_some());
        if !delta.text.is_empty() || reports_tokens {
            let content = ChunkDelta { role: None, content: Some(delta.text) };
            let choice =
                ChunkChoice { index, delta: content, logprobs, token_ids, ..Default::default() };
            self.send(choice, frame);
        }
        if let Some(finish) = &delta.finish {
            let finish_reason = Some(reason(finish.reason));
            let stop_reason = finish.stop_value();
            let choice = ChunkChoice { index, finish_reason, stop_reason, ..Default::default() };
            self.send(choice, frame);
        }
    }

    fn usage(&mut self, frame: &mut Frame) {
        frame.data(&self.chunk(Vec::new(), Some(Some(self.reply.usage()))));
    }
}
