//! Everything the scheduler says besides plans: commands to the worker, results for clients.
//!
//! The queue keeps order; it does not decide what is said. Invariant: a request's last output is
//! its one `Finished` or `Refused`.

use core::time::Duration;
use ids::{Incarnation, RequestId, StepSeq, TokenId, Tokens};
use std::collections::VecDeque;
use step::{Logprobs, PromptLogprobs, SampleFault, Upload};

/// One thing said.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// To the worker, before the next plan.
    Upload(Upload),
    /// To the worker: the tokens uploaded for a request are not needed any more.
    Forget(Incarnation, RequestId),
    /// The request got its first slot; `cached` prompt tokens were found in the prefix cache.
    Started {
        /// The request.
        request: RequestId,
        /// Prompt tokens that need no computing.
        cached: Tokens,
    },
    /// The next output token.
    Token {
        /// The request.
        request: RequestId,
        /// The token.
        token: TokenId,
        /// Where asked for.
        logprobs: Option<Box<Logprobs>>,
    },
    /// The next part of the prompt's log-probabilities; parts are in order and do not overlap.
    PromptLogprobs(PromptLogprobs),
    /// The request's end.
    Finished {
        /// The request.
        request: RequestId,
        /// Why it ended.
        reason: FinishReason,
        /// What is billed.
        usage: Usage,
    },
    /// The request's end before it was queued.
    Refused {
        /// The request.
        request: RequestId,
        /// Why.
        reason: Refusal,
    },
    /// The worker cannot be trusted: end this life, then report it lost. Said once per life.
    RestartWorker {
        /// The life to end.
        incarnation: Incarnation,
        /// Why.
        reason: WorkerFault,
    },
}

/// Tokens of one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of the prompt.
    pub prompt: Tokens,
    /// Of the prompt, found in the prefix cache at first admission.
    pub cached: Tokens,
    /// Generated and kept.
    pub output: Tokens,
}

/// Why a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end token or one of the client's stop tokens, which is the last output token.
    Stop(TokenId),
    /// A stop string in the text.
    StopString,
    /// `max_tokens` were generated.
    Length,
    /// The client left.
    Aborted,
    /// The deadline passed first.
    Deadline,
    /// No token could be drawn.
    Fault(SampleFault),
    /// Refused after all, before it ran: no worker now can run it, or it had to give way.
    Refused(Refusal),
    /// The worker died each time this request ran, the last time with nothing beside it.
    WorkerDied {
        /// How often.
        deaths: u32,
    },
}

/// Why a request was not accepted; the numbers are for the client's error message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Nothing to continue.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// Prompt and output are longer than the model's or the server's context.
    #[error(
        "the prompt has {prompt} tokens and {max_tokens} more may be generated, but the context \
         holds {max_context}"
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt: Tokens,
        /// Output tokens asked for.
        max_tokens: Tokens,
        /// The limit.
        max_context: Tokens,
    },
    /// It would not fit if it ran alone.
    #[error(
        "{tokens} tokens need {need} super-blocks of KV cache and the worker has {have}; shorten \
         the prompt or max_tokens, or give the cache more memory"
    )]
    CacheTooSmall {
        /// Prompt and output.
        tokens: Tokens,
        /// Super-blocks needed.
        need: u64,
        /// Super-blocks there are.
        have: u64,
    },
    /// Too many requests wait.
    #[error("{waiting} requests wait, the limit is {limit}; try again later")]
    QueueFull {
        /// Requests waiting.
        waiting: u32,
        /// The limit.
        limit: u32,
        /// How long those will last.
        wait: Duration,
    },
    /// Too many tokens wait.
    #[error("{waiting} prompt tokens wait, {limit} may and this prompt has {prompt}; try later")]
    QueueTokens {
        /// Tokens waiting.
        waiting: u64,
        /// Tokens of this prompt.
        prompt: Tokens,
        /// The limit.
        limit: u64,
        /// How long those will last.
        wait: Duration,
    },
    /// It waited in a full queue and gave its place to another.
    #[error(
        "the queue is full, and this request gave its place to one of a better priority or of a \
         tenant with less in it; try again later"
    )]
    Shed {
        /// How long the queue will last.
        wait: Duration,
    },
    /// It could not have ended before its deadline.
    #[error("{left:?} are left until the deadline and the request needs about {needs:?}")]
    DeadlineUnreachable {
        /// From its seat to its end.
        needs: Duration,
        /// Until the deadline.
        left: Duration,
        /// How long the queue will last.
        wait: Duration,
    },
    /// The deadline passed before it came in.
    #[error("the deadline passed before the request was queued")]
    DeadlinePassed,
}

impl Refusal {
    /// When to try again, where that may help: once the queue is gone.
    #[must_use]
    pub fn retry_after(self) -> Option<Duration> {
        match self {
            Self::QueueFull { wait, .. }
            | Self::QueueTokens { wait, .. }
            | Self::Shed { wait }
            | Self::DeadlineUnreachable { wait, .. } => Some(wait),
            Self::EmptyPrompt
            | Self::TooLong { .. }
            | Self::CacheTooSmall { .. }
            | Self::DeadlinePassed => None,
        }
    }
}

/// Why a worker's life must end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WorkerFault {
    /// No outcome for too long.
    #[error("no outcome of step {seq} after {waited:?}")]
    Overdue {
        /// The step.
        seq: StepSeq,
        /// Since it could start.
        waited: Duration,
    },
    /// The outcome's samples are not those of the plan.
    #[error("the outcome of step {seq} has samples that its plan did not ask for, or lacks some")]
    Contradiction {
        /// The step.
        seq: StepSeq,
    },
}

/// Outputs not yet polled, with a count that tells whether a given one was.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    queue: VecDeque<Output>,
    said: u64,
}

/// Position of an output in everything ever said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Ticket(u64);

impl Outbox {
    pub(crate) fn say(&mut self, output: Output) -> Ticket {
        self.queue.push_back(output);
        self.said += 1;
        Ticket(self.said)
    }

    pub(crate) fn poll(&mut self) -> Option<Output> {
        self.queue.pop_front()
    }

    /// Whether the output with this ticket has left.
    pub(crate) fn left(&self, ticket: Ticket) -> bool {
        ticket.0 + self.queue.len() as u64 <= self.said
    }
}
