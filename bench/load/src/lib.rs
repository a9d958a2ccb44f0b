//! Load on a server over its HTTP API, as clients see it: streams of completions with every token
//! timed at arrival; and what several loads amounted to, as a plot.
//!
//! It knows nothing of the engine; any OpenAI-compatible server can be the target. Invariant: a
//! figure counts only streams that ended as they should, and failures are counted beside it.

mod chart;
mod client;
mod labels;
mod lines;
mod pareto;
mod report;
mod run;
mod stats;

pub use client::{Client, ClientError, StreamEnd, Timeline};
pub use lines::{Line, draw_lines};
pub use pareto::{Curve, PlotError, Point, draw};
pub use report::{Percentiles, Report};
pub use run::{Load, Prompts, run};
pub use stats::percentile;
