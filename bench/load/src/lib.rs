//! Load on a server over its HTTP API, as clients see it: streams of completions with every token
//! timed at arrival.
//!
//! It knows nothing of the engine; any OpenAI-compatible server can be the target. Invariant: a
//! figure counts only streams that ended as they should, and failures are counted beside it.

mod client;
mod report;
mod run;
mod stats;

pub use client::{Client, ClientError, StreamEnd, Timeline};
pub use report::{Percentiles, Report};
pub use run::{Load, Prompts, run};
pub use stats::percentile;
