//! What the gateway needs from an engine, and all it knows of one.
//!
//! The gateway sends token ids and gets token ids back; it knows no scheduler, worker or block.
//! It does not retry: a refusal or failure is reported as it is. Invariant: a [`Generation`] that
//! is dropped before its end is aborted, so a client that goes away frees what it held.

use ids::{RequestId, TokenId, Tokens};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};
use step::{Logprobs, PromptLogprobs, Sampling};
use tokio::sync::mpsc;

/// One generation to run: one choice of one prompt. Everything in it has been checked.
#[derive(Clone, Debug)]
pub struct GenerateRequest {
    /// At least one token, each below [`Limits::vocab`].
    pub prompt: Arc<[TokenId]>,
    /// Has passed [`Sampling::check`].
    pub sampling: Arc<Sampling>,
    /// The most tokens to generate; `prompt.len() + max_tokens <= Limits::max_context`.
    /// Zero runs the prompt (for its log-probabilities) and samples nothing.
    pub max_tokens: Tokens,
    /// Generating one of these ends the generation once `sampling.min_tokens` were generated; the
    /// token itself is still delivered and counted. Sorted, no token twice. The model's end tokens
    /// are among them unless the client asked to ignore them.
    pub stop_token_ids: Arc<[TokenId]>,
    /// Report the log-probability of every prompt token but the first, with this many alternatives.
    pub prompt_logprobs: Option<u8>,
    /// Separates prefix-cache entries: requests share only under equal salts.
    pub cache_salt: Option<Arc<str>>,
    /// Lower runs earlier; 0 is normal.
    pub priority: i32,
    /// Who it is for; tenants share what there is of a priority. Those without a name are one.
    pub tenant: Option<Arc<str>>,
    /// Give up this long after submission.
    pub deadline: Option<Duration>,
}

/// What happens to a generation, in this order: `Started` once, all of `PromptLogprobs`, any number
/// of `Tokens`, then exactly one of `Finished` and `Failed`. Preemption is not visible.
#[derive(Debug)]
pub enum GenerationEvent {
    /// Left the queue. Comes with the first result, or earlier.
    Started {
        /// Prompt tokens whose KV was found in the prefix cache.
        cached: Tokens,
    },
    /// Log-probabilities of consecutive prompt tokens; parts come in order and leave no gap.
    PromptLogprobs(PromptLogprobs),
    /// Tokens in generation order.
    Tokens(Vec<GeneratedToken>),
    /// The end. Nothing follows.
    Finished(FinishReason),
    /// The end of a generation that cannot go on. Nothing follows.
    Failed(GenerationError),
}

/// One generated token.
#[derive(Clone, Debug)]
pub struct GeneratedToken {
    /// The token.
    pub token: TokenId,
    /// Present when `sampling.logprobs` asked for it.
    pub logprobs: Option<Box<Logprobs>>,
}

/// Why a generation ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The last delivered token is one of `stop_token_ids`.
    Stop,
    /// `max_tokens` were generated.
    Length,
}

/// Why a generation ended without result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GenerationError {
    /// The engine's own check came to another result than the one at submission: the queue filled
    /// up in between, or the worker that came up cannot hold the request.
    #[error(transparent)]
    Refused(#[from] SubmitError),
    /// The request's deadline passed.
    #[error("the request's deadline passed before it was done")]
    DeadlineExceeded,
    /// The model produced NaN for this request.
    #[error("the model produced values that are not numbers for this request")]
    NotANumber,
    /// Bans and biases left no token to draw.
    #[error("logit_bias and min_tokens leave no token that may be generated")]
    NothingAllowed,
    /// The workers died too often while this request was running, at last while it ran alone.
    #[error(
        "the workers died several times while this request was running, at last while nothing else was; \
         it is not tried again"
    )]
    WorkerLost,
    /// The server is shutting down and its drain time is over.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// Anything else, in words for an operator.
    #[error("{0}")]
    Internal(String),
}

/// Why a request was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The queue holds as many requests or tokens as it may.
    #[error("the queue is full; try again later")]
    QueueFull {
        /// When to try again.
        retry_after: Duration,
    },
    /// It waited in a full queue and gave its place to another.
    #[error(
        "the queue is full and a more urgent user, or one with less in it, came; try again later"
    )]
    Shed {
        /// When to try again.
        retry_after: Duration,
    },
    /// It could not have ended before its deadline.
    #[error(
        "{left:.1?} are left until the request's deadline and it would run for about {needs:.1?}; \
         try again later, ask for fewer tokens, or wait longer"
    )]
    DeadlineUnreachable {
        /// How long it would run.
        needs: Duration,
        /// Until its deadline.
        left: Duration,
        /// When to try again.
        retry_after: Duration,
    },
    /// There is no worker that could run it now.
    #[error("the engine is not ready: {0}")]
    NotReady(Readiness),
    /// It can never fit: its KV needs more blocks than there are.
    #[error(
        "{tokens} tokens need {need} large blocks of KV cache and there are {have}; shorten the \
         prompt or lower max_tokens"
    )]
    TooLarge {
        /// Prompt and `max_tokens`.
        tokens: Tokens,
        /// Large blocks needed.
        need: u64,
        /// Large blocks there are.
        have: u64,
    },
    /// Longer than the model's or the server's context.
    #[error(
        "the maximum context length is {max_context} tokens; you asked for {prompt} tokens in the \
         prompt and {max_tokens} to generate"
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt: Tokens,
        /// Tokens to generate.
        max_tokens: Tokens,
        /// The limit.
        max_context: Tokens,
    },
    /// Nothing to continue.
    #[error("the prompt is empty")]
    EmptyPrompt,
}

/// Whether the engine serves. Readiness is progress, not a promise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// Takes requests, and the last step with work queued is recent.
    Ready,
    /// Weights are on their way.
    Loading {
        /// Of the bytes to load, 0 to 100.
        percent: u8,
    },
    /// The worker group is gone and another is being started.
    Restarting {
        /// Until it should serve, as far as earlier starts tell.
        left: Duration,
    },
    /// Work is queued and no step has ended for too long.
    Stalled,
    /// Asked to stop.
    Draining,
}

impl Readiness {
    /// When to come again, where that is foreseen.
    #[must_use]
    pub const fn back_in(&self) -> Option<Duration> {
        match self {
            Self::Restarting { left } => Some(*left),
            Self::Ready | Self::Loading { .. } | Self::Stalled | Self::Draining => None,
        }
    }
}

impl std::fmt::Display for Readiness {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ready => f.write_str("ready"),
            Self::Loading { percent } => write!(f, "loading weights, {percent} % done"),
            Self::Restarting { left } => {
                write!(f, "the workers are restarting and should serve in about {left:.0?}")
            }
            Self::Stalled => f.write_str("no step has ended for too long"),
            Self::Draining => f.write_str("shutting down"),
        }
    }
}

/// What the engine can take. Constant over its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Token ids are below this.
    pub vocab: u32,
    /// Prompt and generated tokens of one request together.
    pub max_context: Tokens,
}

/// Where a generation's time went: an object whose `parts` touch, each with `from_ms` and `ms`, all
/// counted from an instant that the caller chose. The rest of it is between the engine and whoever reads.
pub type Story = serde_json::Value;

/// Why a generation's story is not told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoStory {
    /// The engine keeps no journal.
    #[error("no journal is kept here: the server was started with --journal-bytes 0")]
    NoJournal,
    /// It is not in the journal, or the journal cannot be read now; in words for an operator.
    #[error("{0}")]
    NotTold(String),
}

/// The stories of some generations, once they are read.
pub type Stories = Pin<Box<dyn Future<Output = Vec<Result<Story, NoStory>>> + Send>>;

/// An engine, as the gateway sees it. Implemented over the scheduler, and by fakes in tests.
pub trait Engine: Send + Sync + 'static {
    /// Queues one generation. Must not block; hashing the prompt here is fine. Whether it may wait for
    /// an engine that is not ready is the engine's decision.
    ///
    /// # Errors
    /// When it is not taken; nothing of it remains then.
    fn submit(&self, request: GenerateRequest) -> Result<Generation, SubmitError>;

    /// Whether requests are served now.
    fn readiness(&self) -> Readiness;

    /// What a request may ask for.
    fn limits(&self) -> Limits;

    /// Where the time of each of these generations went, counted from `since` and told up to `until`.
    fn explain(
        &self,
        generations: &[RequestId],
        since: Instant,
        until: Option<Instant>,
    ) -> Stories {
        let _ = (since, until);
        let untold = vec![Err(NoStory::NoJournal); generations.len()];
        Box::pin(std::future::ready(untold))
    }
}

/// How a generation reaches back into its engine. Each is called at most once, and only one of them.
pub trait GenerationControl: Send + Sync + 'static {
    /// A stop string ended the text: keep and bill the first `keep` generated tokens, drop the rest.
    fn stop(&self, keep: Tokens);

    /// Nobody waits for it any more.
    fn abort(&self);
}

/// A generation under way. Dropping it before its last event aborts it.
pub struct Generation {
    number: Option<RequestId>,
    events: mpsc::UnboundedReceiver<GenerationEvent>,
    control: Option<Box<dyn GenerationControl>>,
}

impl Generation {
    /// A generation whose events come from the sender of `events`. The channel is unbounded so that
    /// the engine's thread never waits; it is bounded by `max_tokens`, and the gateway gives up on
    /// a client that stops reading.
    #[must_use]
    pub fn new(
        events: mpsc::UnboundedReceiver<GenerationEvent>,
        control: Box<dyn GenerationControl>,
    ) -> Self {
        Self { number: None, events, control: Some(control) }
    }

    /// The same, known to the engine's journal under this number.
    #[must_use]
    pub fn numbered(mut self, number: RequestId) -> Self {
        self.number = Some(number);
        self
    }

    /// Its number, where the engine gives any.
    #[must_use]
    pub fn number(&self) -> Option<RequestId> {
        self.number
    }

    /// The next event. After the last one, and when the engine went away without saying why, a
    /// failure: the caller never waits for ever and never sees a silent end.
    pub async fn next(&mut self) -> GenerationEvent {
        let event = self.events.recv().await.unwrap_or_else(|| {
            GenerationEvent::Failed(GenerationError::Internal(
                "the engine dropped the request".to_owned(),
            ))
        });
        if matches!(event, GenerationEvent::Finished(_) | GenerationEvent::Failed(_)) {
            self.control = None;
        }
        event
    }

    /// Ends the generation at a stop string, keeping the first `keep` generated tokens.
    pub fn stop(mut self, keep: Tokens) {
        if let Some(control) = self.control.take() {
            control.stop(keep);
        }
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if let Some(control) = self.control.take() {
            control.abort();
        }
    }
}
