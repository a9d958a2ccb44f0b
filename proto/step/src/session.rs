//! The life of a worker's stream: it loads, says hello, is configured, then steps.
//!
//! worker: `Loading`* `Hello` | scheduler: `Configure` | worker: `Ready` | then uploads and steps
//! one way, outcomes the other, until either side goes away. What a part of the start took is told by
//! `Started` at any time before `Ready`.

use crate::{Outcome, Seat, StepPlan};
use ids::{Bytes, GroupId, Incarnation, RequestId, TokenId, Tokens};
use std::sync::Arc;
use std::time::Duration;

/// From the scheduler to one worker, in order. Steps and the configuration go to every rank of a group,
/// what concerns one request to the ranks of its shard.
#[derive(Clone, Debug, PartialEq)]
pub enum ToWorker {
    /// Once, in answer to `Hello`.
    Configure(Configure),
    /// Tokens ahead of the admission that names them.
    Upload(Upload),
    /// The tokens of a request that will not be admitted any more.
    Forget(Incarnation, RequestId),
    /// A step; the stream's order is execution order.
    Step(Arc<StepPlan>),
}

/// From a worker to the scheduler, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum ToScheduler {
    /// Start-up progress.
    Loading(LoadProgress),
    /// A part of the start is over, and how long it took.
    Started(StartPhase, Duration),
    /// Once, when the weights are in place.
    Hello(Hello),
    /// Once, when memory is carved as configured.
    Ready(Incarnation),
    /// A step's result, in step order.
    Outcome(Outcome),
    /// The worker cannot go on; the text says why and what to do. It exits after this.
    Fault(String),
}

/// Start-up progress of one worker.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadProgress {
    /// What is being done, for a person.
    pub stage: String,
    /// Bytes done in this stage.
    pub done: Bytes,
    /// Bytes of this stage; zero when unknown.
    pub total: Bytes,
}

/// A part of a worker's start, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum StartPhase {
    /// A device is opened.
    Device,
    /// Its kernels are loaded.
    Kernels,
    /// Weights are read, or made.
    Weights,
    /// Memory of steps and cache is allocated.
    Memory,
    /// Steps are captured into graphs.
    Graphs,
}

/// What a worker has to offer.
#[derive(Clone, Debug, PartialEq)]
pub struct Hello {
    /// Architecture name from the checkpoint.
    pub architecture: String,
    /// Vocabulary entries that may be sampled or given.
    pub vocab: u32,
    /// Longest context of the checkpoint.
    pub max_context: Tokens,
    /// Cache groups of the model, numbered from 0.
    pub groups: Vec<GroupSpec>,
    /// Bytes that may be carved into KV blocks.
    pub cache_bytes: Bytes,
    /// Alignment of every super-block.
    pub alignment: Bytes,
    /// What executes: `cpu`, later `cuda`.
    pub backend: String,
    /// Which rank of which mesh this is.
    pub seat: Seat,
    /// Bytes of weights that this rank holds.
    pub weight_bytes: Bytes,
    /// Bytes of host memory that may hold KV blocks for which the cache has no room.
    pub host_bytes: Bytes,
}

/// Layers whose KV lives and dies together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupSpec {
    /// Number of the group.
    pub group: GroupId,
    /// What of the past its layers read.
    pub kind: GroupKind,
    /// Bytes of one block on this rank, all layers of the group.
    pub block_bytes: Bytes,
}

/// What of the past a group's layers read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupKind {
    /// Every earlier token (full attention, MLA latents).
    Full,
    /// The token itself and the `window - 1` before it.
    Sliding {
        /// Tokens seen, the newest included.
        window: Tokens,
    },
}

/// How the scheduler wants the worker's memory and limits.
#[derive(Clone, Debug, PartialEq)]
pub struct Configure {
    /// The life that begins.
    pub incarnation: Incarnation,
    /// Rows of the slot table.
    pub max_slots: u32,
    /// Most tokens of one step.
    pub max_step_tokens: Tokens,
    /// Longest context served.
    pub max_context: Tokens,
    /// Carving of the cache.
    pub carving: Carving,
}

/// Fixed super-blocks over the cache; block `b` of group `g` lies at
/// `(b / per_super[g]) * super_bytes + (b % per_super[g]) * block_bytes[g]`. Addresses never move.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Carving {
    /// Bytes of a super-block.
    pub super_bytes: Bytes,
    /// Super-blocks in the cache.
    pub supers: u32,
    /// Blocks that one super-block holds, per group.
    pub per_super: Vec<u32>,
    /// Blocks of each group that the host's memory holds; 0 where none is used. Block `s` of group `g`
    /// lies there at `host_blocks * (block_bytes[0] + … + block_bytes[g - 1]) + s * block_bytes[g]`.
    pub host_blocks: u32,
}

/// Tokens of a request, before it is admitted. May come in several, in order.
#[derive(Clone, Debug, PartialEq)]
pub struct Upload {
    /// The life this is meant for.
    pub incarnation: Incarnation,
    /// The request.
    pub request: RequestId,
    /// Position of the first token; 0 starts the request's tokens anew.
    pub offset: Tokens,
    /// The tokens.
    pub tokens: Arc<[TokenId]>,
}
