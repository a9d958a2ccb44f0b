//! Everything that can happen to the scheduler, on one screen.
//!
//! Events are facts; whether one fits the present state is decided where it is handled.

use ids::{BlockHash, Incarnation, RequestId, TenantId, Timestamp, TokenId, Tokens};
use std::sync::Arc;
use step::{Carving, GroupSpec, Outcome, Sampling};

/// What happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// A client wants tokens.
    Submit(Box<Submit>),
    /// A client is gone; no step planned from now on runs the request.
    Abort(RequestId),
    /// A stop string ended in the text after `keep` output tokens; later ones never were.
    Stop {
        /// The request.
        request: RequestId,
        /// Output tokens that count.
        keep: Tokens,
    },
    /// Take the request's slot and blocks away as if memory were short. For tests of equality.
    ForcePreempt(RequestId),
    /// A step's result.
    Outcome(Outcome),
    /// A worker loaded the model and carved its cache.
    WorkerReady(Box<WorkerReady>),
    /// The worker of this incarnation is gone, with its slots and its cache.
    WorkerLost(Incarnation),
    /// The time of [`crate::Scheduler::next_wakeup`] came.
    Wakeup,
}

/// One generation to run.
#[derive(Clone, Debug)]
pub struct Submit {
    /// Its id, never used before.
    pub request: RequestId,
    /// The prompt, at least one token.
    pub prompt: Arc<[TokenId]>,
    /// Hashes of the prompt's full blocks, chained from `root`; may stop early, the rest is hashed
    /// when needed.
    pub prompt_hashes: Arc<[BlockHash]>,
    /// The hash before the first block, which carries tenant and adapter.
    pub root: BlockHash,
    /// How to sample.
    pub sampling: Arc<Sampling>,
    /// Most output tokens. With 0 the prompt runs, for its log-probabilities, and nothing is
    /// generated.
    pub max_tokens: Tokens,
    /// The model's end tokens.
    pub end_tokens: Arc<[TokenId]>,
    /// Whether end tokens do not end.
    pub ignore_eos: bool,
    /// The client's own stop tokens; they end also with `ignore_eos`.
    pub stop_tokens: Arc<[TokenId]>,
    /// Log-probabilities of the prompt with this many alternatives; bypasses the prefix cache.
    pub prompt_logprobs: Option<u8>,
    /// Lower runs first.
    pub priority: i32,
    /// Whose it is; tenants share what there is of a priority.
    pub tenant: TenantId,
    /// When the client stops waiting for the end.
    pub deadline: Option<Timestamp>,
    /// When it came in; orders requests of one priority.
    pub arrival: Timestamp,
}

/// What a worker group offers for its life.
#[derive(Clone, Debug)]
pub struct WorkerReady {
    /// The life; larger than every earlier one.
    pub incarnation: Incarnation,
    /// Cache groups of the model.
    pub groups: Vec<GroupSpec>,
    /// The carving it was configured with.
    pub carving: Carving,
}
