//! The catalogue of metrics and log field names: everything that is measured is named here once.
//!
//! Labels come from closed enums and from the model's name, which is fixed at start; nothing a
//! client sends becomes a label, so the number of series is bounded. This crate measures nothing.

pub mod field;
mod gpu;
mod label;
mod metrics;
mod reference;

pub use gpu::GpuMetrics;
pub use label::{
    BlockState, Clock, Door, EccError, FinishedBy, PlacedBy, RefusedBy, StartupPhase, StatusClass,
    StepKind, StepsAhead, Throttling,
};
pub use metrics::Metrics;
