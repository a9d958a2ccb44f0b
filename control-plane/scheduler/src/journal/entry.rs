//! One thing that happened, as the journal keeps it: fixed in size, with its time where it has one.
//!
//! Holds no history of its own; what a line means to a request is read off in order. Invariant: what
//! a step does to slots stands right before the step's own line, in the order of its plan.

use crate::output::FinishReason;
use crate::report::Waits;
use ids::{RequestId, ShardId, StepSeq, Timestamp, Tokens};

/// A row of one shard's slot table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Row {
    pub(crate) shard: ShardId,
    pub(crate) slot: u32,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Entry {
    Submitted {
        request: RequestId,
        arrival: Timestamp,
        prompt: Tokens,
    },
    /// The shard that a request stays in; the first where nothing is said.
    Placed(RequestId, ShardId),
    /// The first in a shard's line and what keeps it there, where that is news.
    Head(ShardId, RequestId, Waits),
    /// Nobody is in that line any more.
    NoHead(ShardId),
    /// Has a seat and is left out of the step that follows.
    Stalled(RequestId, Waits),
    Admitted {
        request: RequestId,
        row: Row,
        known: Tokens,
        cached: Tokens,
    },
    /// Its seat is taken away; the row is vacated with the next plan.
    Unseated(RequestId, Timestamp),
    Vacated(Row),
    Chunk {
        row: Row,
        tokens: Tokens,
        sample: bool,
    },
    Joined(Row),
    Left(Row),
    /// A plan was made; what it does stands before it.
    Planned(Plan),
    /// A step's results were handed to their requests.
    Ended(End),
    Finished {
        request: RequestId,
        at: Timestamp,
        by: Ending,
        output: Tokens,
    },
    Ready(Timestamp),
    Lost(Timestamp),
}

/// A step's plan in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Plan {
    pub(crate) at: Timestamp,
    pub(crate) seq: StepSeq,
    pub(crate) decode: u32,
    pub(crate) chunks: u32,
    pub(crate) prefill: Tokens,
    pub(crate) running: u32,
    pub(crate) waiting: u32,
    pub(crate) ahead: u8,
    pub(crate) cache_percent: u8,
    /// 0: not known yet.
    pub(crate) predicted_us: u32,
}

/// A step's end in numbers. Times of the worker's own clock saturate after an hour.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct End {
    pub(crate) seq: StepSeq,
    pub(crate) sent: Timestamp,
    pub(crate) answered: Timestamp,
    pub(crate) delivered: Timestamp,
    pub(crate) total_us: u32,
    pub(crate) model_us: u32,
}

/// How a request ended, without the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// An end token or a stop token.
    Stop,
    /// A stop string in the text.
    StopString,
    /// All tokens that were asked for.
    Length,
    /// The client left.
    Aborted,
    /// Its deadline passed.
    Deadline,
    /// No token could be drawn.
    Fault,
    /// It was not accepted.
    Refused,
    /// Workers died under it.
    WorkerDied,
}

impl Ending {
    /// The ending as a word.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::StopString => "stop_string",
            Self::Length => "length",
            Self::Aborted => "aborted",
            Self::Deadline => "deadline",
            Self::Fault => "fault",
            Self::Refused => "refused",
            Self::WorkerDied => "worker_died",
        }
    }

    /// Whether a step's outcome ended it, and not something else meanwhile.
    pub(crate) fn by_outcome(self) -> bool {
        match self {
            Self::Stop | Self::Length | Self::Fault => true,
            Self::StopString
            | Self::Aborted
            | Self::Deadline
            | Self::Refused
            | Self::WorkerDied => false,
        }
    }

    pub(crate) fn of(reason: FinishReason) -> Self {
        match reason {
            FinishReason::Stop(_) => Self::Stop,
            FinishReason::StopString => Self::StopString,
            FinishReason::Length => Self::Length,
            FinishReason::Aborted => Self::Aborted,
            FinishReason::Deadline => Self::Deadline,
            FinishReason::Fault(_) => Self::Fault,
            FinishReason::Refused(_) => Self::Refused,
            FinishReason::WorkerDied { .. } => Self::WorkerDied,
        }
    }
}
