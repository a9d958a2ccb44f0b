//! From a checked request to running choices, and to what replies say about all of them.

use crate::book::Visit;
use crate::choice::{Choice, Decoder, Delta, Finish, StopReason};
use crate::engine::{FinishReason, GenerateRequest, Generation, Readiness, SubmitError};
use crate::error::ApiError;
use crate::logprobs::Names;
use crate::request::RequestContext;
use crate::state::{AppState, Gateway};
use crate::validate::Checked;
use crate::validate::prompt::Prompt;
use futures::stream::{FuturesUnordered, TryStreamExt};
use ids::{RequestId, TokenId};
use serde::Serialize;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Submits every choice. When one is refused, those before it are aborted.
pub(crate) fn submit(
    checked: &Checked,
    gateway: &Gateway,
    context: &RequestContext,
    timeout: Option<Duration>,
) -> Result<Vec<Choice>, ApiError> {
    let mut generations = Vec::new();
    let common = &checked.common;
    let deadline = gateway.deadline(timeout);
    let mut choices = Vec::with_capacity(checked.prompts.len() * common.n as usize);
    for (prompt, max_tokens) in &checked.prompts {
        for choice in 0..common.n {
            let mut sampling = common.sampling.clone();
            sampling.choice = choice;
            sampling.logprobs = checked.logprobs;
            let request = GenerateRequest {
                prompt: Arc::clone(&prompt.tokens),
                sampling: Arc::new(sampling),
                max_tokens: *max_tokens,
                stop_token_ids: Arc::clone(&common.stop_token_ids),
                // All choices of a prompt have the same. A whole reply copies them from the first;
                // in a stream any choice may come first.
                prompt_logprobs: checked
                    .prompt_logprobs
                    .filter(|_| choice == 0 || common.stream.is_some()),
                cache_salt: common.cache_salt.clone(),
                priority: common.priority,
                tenant: common.user.clone(),
                deadline,
            };
            // Nothing to run: the answer is the prompt alone.
            let idle = max_tokens.is_zero() && request.prompt_logprobs.is_none();
            let generation = if idle { None } else { Some(start(request, gateway)?) };
            generations.extend(generation.as_ref().and_then(Generation::number));
            let decoder = Decoder::new(gateway.text.tokenizer.as_ref(), common);
            let metrics = Arc::clone(&gateway.metrics);
            choices.push(Choice::new(choices.len(), generation, decoder, metrics));
        }
        gateway.metrics.prompt_tokens.inc_by(prompt.tokens.len() as u64);
    }
    if !generations.is_empty() {
        enter(context, gateway, generations);
    }
    Ok(choices)
}

/// Notes which generations the request became, for whoever asks later where its time went.
fn enter(context: &RequestContext, gateway: &Gateway, generations: Vec<RequestId>) {
    let line = gateway.book.enter(Visit {
        id: context.id.clone(),
        client_id: context.client_id.clone(),
        door: context.door,
        received: context.received,
        submitted: Instant::now(),
        replied: None,
        generations,
    });
    let _ = context.line.set(line);
}

fn start(request: GenerateRequest, gateway: &Gateway) -> Result<Generation, ApiError> {
    let result = match gateway.readiness() {
        Readiness::Draining => Err(SubmitError::NotReady(Readiness::Draining)),
        // Whether an engine takes requests that stalls, starts or restarts is its own decision.
        _ => gateway.engine.submit(request),
    };
    result.map_err(|error| {
        gateway.metrics.refused(error.label()).inc();
        ApiError::from(error)
    })
}

/// Token counts, as OpenAI reports them.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Usage {
    prompt_tokens: usize,
    total_tokens: usize,
    completion_tokens: usize,
    prompt_tokens_details: PromptDetails,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
struct PromptDetails {
    cached_tokens: usize,
}

/// What all pieces of one reply share.
pub(crate) struct Reply {
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) checked: Checked,
    pub(crate) gateway: AppState,
    usage: Usage,
}

impl Reply {
    pub(crate) fn new(id: String, checked: Checked, gateway: AppState) -> Self {
        let prompt_tokens = checked.prompts.iter().map(|(prompt, _)| prompt.tokens.len()).sum();
        let usage = Usage { prompt_tokens, total_tokens: prompt_tokens, ..Usage::default() };
        let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        Self { id, created, checked, gateway, usage }
    }

    /// Counts a piece.
    pub(crate) fn count(&mut self, delta: &Delta) {
        self.usage.completion_tokens += delta.tokens.len();
        self.usage.total_tokens += delta.tokens.len();
        let first_of_prompt = delta.index.is_multiple_of(self.checked.common.n as usize);
        if let Some(opening) = delta.opening.as_ref().filter(|_| first_of_prompt) {
            self.usage.prompt_tokens_details.cached_tokens += opening.cached.as_usize();
        }
    }

    pub(crate) fn usage(&self) -> Usage {
        self.usage.clone()
    }

    /// How tokens are spelled in log-probabilities.
    pub(crate) fn names(&self) -> Names<'_> {
        let tokenizer = self.gateway.text.tokenizer.as_deref();
        Names::new(tokenizer.filter(|_| !self.checked.common.tokens_as_ids))
    }

    /// The prompt of a choice.
    pub(crate) fn prompt(&self, index: usize) -> &Prompt {
        &self.checked.prompts[index / self.checked.common.n as usize].0
    }

    /// The prompt's ids, where the client wants them.
    pub(crate) fn prompt_token_ids(&self, index: usize) -> Option<Vec<u32>> {
        let wanted = self.checked.common.return_token_ids;
        wanted.then(|| self.prompt(index).tokens.iter().map(|token| token.0).collect())
    }

    /// A piece's ids, where the client wants them.
    pub(crate) fn token_ids(&self, delta: &Delta) -> Option<Vec<u32>> {
        let wanted = self.checked.common.return_token_ids;
        wanted.then(|| delta.tokens.iter().map(|token| token.token.0).collect())
    }
}

/// As OpenAI spells it.
pub(crate) fn reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

/// The client's stop that ended a choice: an id or a string.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum StopValue {
    Token(u32),
    Text(Box<str>),
}

impl Finish {
    /// For `stop_reason`.
    pub(crate) fn stop_value(&self) -> Option<StopValue> {
        match &self.stop {
            StopReason::None => None,
            StopReason::Token(TokenId(id)) => Some(StopValue::Token(*id)),
            StopReason::Text(text) => Some(StopValue::Text(text.clone())),
        }
    }
}

/// All choices to their ends, in order of index.
///
/// # Errors
/// The first failure; the other choices are aborted then.
pub(crate) async fn collect(choices: Vec<Choice>) -> Result<Vec<Delta>, ApiError> {
    // Polled as they come: a failure must not wait for choices before it to run to their ends.
    let mut running: FuturesUnordered<_> = choices.into_iter().map(Choice::whole).collect();
    let mut ended = Vec::with_capacity(running.len());
    while let Some(delta) = running.try_next().await? {
        ended.push(delta);
    }
    ended.sort_unstable_by_key(|delta| delta.index);
    Ok(ended)
}
