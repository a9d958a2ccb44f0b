//! The step protocol as plain Rust: what the scheduler says to a worker and what it hears back.
//!
//! Workers hold *slots*; a plan is a delta against them, complete, with nothing left to choose.
//! This crate only holds the types (no wire format, no policy, no execution). Invariant: every
//! message that changes a worker's state carries the [`ids::Incarnation`] it is meant for.

mod digest;
mod mesh;
mod outcome;
mod plan;
mod sampling;
mod session;

pub use digest::Digest;
pub use mesh::{Mesh, Seat};
pub use outcome::{
    Logprobs, Outcome, PromptLogprobs, SampleFault, Sampled, StepTiming, TokenLogprob,
};
pub use plan::{
    Admit, DecodeDelta, GroupTable, PrefillRun, Section, SlotOp, SlotRef, StepPlan, WriteSlot,
};
pub use sampling::{MAX_LOGPROBS, Sampling, SamplingError};
pub use session::{
    Carving, Configure, GroupKind, GroupSpec, Hello, LoadProgress, StartPhase, ToScheduler,
    ToWorker, Upload,
};
