//! What a plan does and what it leaves waiting, and for what: the answer to "why is it slow".
//!
//! The report of a step is a few numbers; [`crate::Scheduler::explain`] names every waiting request
//! on demand. It decides nothing. Invariant: a request that did not run is explained.

use core::time::Duration;
use ids::{Blocks, GroupId, RequestId, StepSeq, Tokens};
use step::StepPlan;

/// A plan and its report.
#[derive(Clone, Debug)]
pub struct Planned {
    /// To be sent, after every output said so far.
    pub plan: StepPlan,
    /// For metrics and the step journal.
    pub report: PlanReport,
}

/// What one step does.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PlanReport {
    /// The step.
    pub seq: StepSeq,
    /// Steps in flight when this one was planned: how far it runs ahead of what is known.
    pub ahead: u32,
    /// Slots that decode.
    pub decode: u32,
    /// Requests with a prompt chunk.
    pub chunks: u32,
    /// Prompt tokens.
    pub prefill_tokens: Tokens,
    /// Requests that got a slot.
    pub admitted: u32,
    /// Requests that lost theirs.
    pub preempted: u32,
    /// Requests with a slot that this step cannot run for want of blocks.
    pub stalled: u32,
    /// Requests with a slot.
    pub running: u32,
    /// Requests without.
    pub waiting: u32,
    /// The first in line and what it waits for.
    pub head: Option<(RequestId, Waits)>,
    /// How long the step should take, once that is known.
    pub predicted: Option<Duration>,
    /// Share of the cache in use.
    pub cache_usage: f64,
}

/// What a request waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waits {
    /// A worker.
    Worker,
    /// Its tokens to leave for the worker.
    Upload,
    /// A row of the slot table.
    Slot {
        /// Rows there are.
        rows: u32,
        /// Rows that come free when launched steps retire.
        arriving: u32,
    },
    /// KV blocks.
    Blocks {
        /// The group that is short.
        group: GroupId,
        /// Blocks wanted.
        need: Blocks,
        /// Blocks that could be had now.
        mintable: Blocks,
        /// Blocks on their way: in limbo, or cached under a step in flight.
        arriving: Blocks,
    },
    /// Tokens of the step: earlier requests took them.
    StepTokens {
        /// The limit.
        limit: Tokens,
    },
    /// Time of the step: more prompt tokens would break the decode budget.
    DecodeBudget {
        /// The budget.
        budget: Duration,
    },
    /// The request before it in line.
    Turn {
        /// How many stand before it.
        ahead: u32,
    },
    /// A request that killed workers runs alone, or must.
    Isolation,
}

impl Waits {
    /// The kind as a word.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Worker => "worker",
            Self::Upload => "upload",
            Self::Slot { .. } => "slot",
            Self::Blocks { .. } => "blocks",
            Self::StepTokens { .. } => "step_tokens",
            Self::DecodeBudget { .. } => "decode_budget",
            Self::Turn { .. } => "turn",
            Self::Isolation => "isolation",
        }
    }
}

/// Figures for metrics; counters only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Gauges {
    /// Requests with a slot.
    pub running: u32,
    /// Requests without.
    pub waiting: u32,
    /// Requests that never ran.
    pub queued: u32,
    /// Tokens of requests that never ran.
    pub queued_tokens: u64,
    /// Share of the cache that live requests hold, between 0 and 1.
    pub cache_usage: f64,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_query_tokens: u64,
    /// Prompt tokens found there.
    pub prefix_hit_tokens: u64,
    /// Of those, what was brought back from the host's memory behind the cache.
    pub host_hit_tokens: u64,
    /// Blocks in the host's memory.
    pub host_blocks: u32,
    /// Blocks that it has room for.
    pub host_room: u32,
    /// Blocks copied there.
    pub host_stores: u64,
    /// Blocks copied back.
    pub host_loads: u64,
    /// Requests that lost their seat and were put back in line.
    pub preemptions: u64,
    /// Sampled tokens that came after their request's end or preemption.
    pub dropped_tokens: u64,
    /// Times the pool was emptied because one request alone could not go on.
    pub purges: u64,
    /// Steps planned.
    pub steps: u64,
    /// Requests that gave their place in a full queue to others.
    pub shed: u64,
    /// Requests ended because their deadline was out of reach.
    pub unreachable: u64,
    /// Requests that got their seat because they had waited longest.
    pub overdue: u64,
    /// Worker lives lost.
    pub deaths: u64,
    /// Events refused, by [`Unfit`].
    pub refused: [u64; Unfit::COUNT],
}

/// Why an event was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// No live request has this id; harmless when it has just ended.
    UnknownRequest,
    /// A submission under the id of a live request.
    DuplicateRequest,
    /// The request's state has no such move.
    WrongState,
    /// Another life of the worker is meant.
    StaleIncarnation,
    /// An outcome seen before.
    RepeatedOutcome,
    /// An outcome before that of an earlier step.
    EarlyOutcome,
    /// The outcome of a step that was never launched.
    UnknownStep,
    /// An outcome that contradicts its plan.
    Contradiction,
    /// A stop after more tokens than were streamed.
    StopBeyondOutput,
}

impl Unfit {
    /// Number of kinds.
    pub const COUNT: usize = Self::ALL.len();
    /// Every kind, in the order of [`Gauges::refused`].
    pub const ALL: [Self; 9] = [
        Self::UnknownRequest,
        Self::DuplicateRequest,
        Self::WrongState,
        Self::StaleIncarnation,
        Self::RepeatedOutcome,
        Self::EarlyOutcome,
        Self::UnknownStep,
        Self::Contradiction,
        Self::StopBeyondOutput,
    ];

    /// The kind as a metric label.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::UnknownRequest => "unknown_request",
            Self::DuplicateRequest => "duplicate_request",
            Self::WrongState => "wrong_state",
            Self::StaleIncarnation => "stale_incarnation",
            Self::RepeatedOutcome => "repeated_outcome",
            Self::EarlyOutcome => "early_outcome",
            Self::UnknownStep => "unknown_step",
            Self::Contradiction => "contradiction",
            Self::StopBeyondOutput => "stop_beyond_output",
        }
    }

    pub(crate) fn index(self) -> usize {
        self as usize
    }
}
