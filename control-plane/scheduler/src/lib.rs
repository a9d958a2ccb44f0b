//! The scheduler of one replica: a pure state machine from events to step plans.
//!
//! A [`Scheduler`] is one data-parallel shard's; [`Shards`] are those of a worker group in lockstep, and
//! [`Join`] makes one outcome of what the group's ranks say.
//!
//! No clock, no I/O, no threads, no randomness: time is an argument and equal events give equal
//! bytes. The driver calls, in this order, [`Scheduler::handle`] for each event, then
//! [`Scheduler::poll_output`] until empty, then [`Scheduler::plan_step`] and again `poll_output`
//! until the plan is `None`; and again when [`Scheduler::next_wakeup`] comes.
//!
//! A worker is never waited for: up to `depth` steps are planned before the outcome of the oldest
//! is known, so a plan states upper bounds and only confirmed tokens are sealed, billed, streamed.
//! Invariant: every submitted request ends exactly once, and no event can panic.

mod admit;
mod config;
mod crowd;
mod decode;
mod door;
mod event;
mod job;
mod journal;
mod life;
mod line;
mod outcome;
mod output;
mod plan;
mod policy;
mod preempt;
mod prefill;
mod report;
pub mod request;
mod scheduler;
mod shards;
mod slab;
mod slots;
mod spare;
mod tables;
mod worker;

pub use config::{Config, ConfigError, MAX_DEPTH};
pub use event::{Event, Submit, WorkerReady};
pub use job::Job;
pub use journal::{Ending, History, Journal, NotKept, Pages, Part, Role, Span, StepShare, Wait};
pub use output::{FinishReason, Output, Refusal, Usage, WorkerFault};
pub use policy::cost::{CostModel, Load};
pub use report::{Gauges, PlanReport, Planned, Unfit, Waits};
pub use scheduler::Scheduler;
pub use shards::{Divergence, Join, Joined, Placement, Shards, Weighed, Why};
pub use slots::SlotLease;
pub use tables::Tables;
