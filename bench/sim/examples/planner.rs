//! Prints the planner's cost for the standard cases, one JSON object a line.

#![allow(clippy::print_stdout)]

use ids::Tokens;
use sim::planner_bench::{Case, Kind, measure};
use std::time::Instant;

fn main() -> Result<(), sim::planner_bench::BenchError> {
    for (context, kind) in [
        (Tokens(1_000), Kind::Steady),
        (Tokens(60_000), Kind::Steady),
        (Tokens(1_000), Kind::Churn),
        (Tokens(60_000), Kind::Churn),
    ] {
        let case = Case { requests: 256, context, kind, steps: 2000 };
        let origin = Instant::now();
        let t = measure(case, || origin.elapsed())?;
        let name = if kind == Kind::Steady { "steady" } else { "churn" };
        println!(
            "{{\"requests\":256,\"context_tokens\":{context},\"kind\":\"{name}\",\
             \"mean_us\":{:.2},\"p50_us\":{:.2},\"p99_us\":{:.2},\"seals_per_step\":{:.2}}}",
            t.mean_us, t.p50_us, t.p99_us, t.seals
        );
    }
    Ok(())
}
