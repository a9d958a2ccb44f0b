//! `bench planner`: the scheduler without a worker, timed from outside.
//!
//! A step here is an outcome handled, the next step planned, outputs drained, and the
//! plan encoded as it travels to a worker.

use crate::cli::PlannerArgs;
use crate::out::say;
use anyhow::{Context, Result};
use ids::Tokens;
use serde_json::json;
use sim::planner_bench::{Case, Kind, measure};
use std::time::Instant;
use step::StepPlan;

/// Requests, context, kind.
const CASES: [(u32, u32, Kind); 10] = [
    (16, 1_000, Kind::Steady),
    (16, 60_000, Kind::Steady),
    (256, 1_000, Kind::Steady),
    (256, 60_000, Kind::Steady),
    (512, 1_000, Kind::Steady),
    (512, 8_000, Kind::Steady),
    (512, 60_000, Kind::Steady),
    (256, 1_000, Kind::Churn),
    (256, 60_000, Kind::Churn),
    (256, 60_000, Kind::Line),
];

/// Measures every case.
pub(crate) fn run(args: &PlannerArgs) -> Result<()> {
    if !args.json {
        say!(
            "{:>9}{:>10}{:>9}{:>11}{:>11}{:>11}{:>8}",
            "requests",
            "context",
            "kind",
            "mean us",
            "p50 us",
            "p99 us",
            "seals"
        )?;
    }
    for (requests, context, kind) in CASES {
        let case = Case { requests, context: Tokens(context), kind, steps: args.steps };
        let mut message = Vec::with_capacity(1 << 16);
        let encode = |plan: &StepPlan| {
            message.clear();
            wire::encode_step(plan, &mut message);
        };
        let time = |run: &mut dyn FnMut()| {
            let begun = Instant::now();
            run();
            begun.elapsed()
        };
        let t = measure(case, time, encode)
            .with_context(|| format!("measure {requests} x {context}"))?;
        let kind = match kind {
            Kind::Steady => "steady",
            Kind::Churn => "churn",
            Kind::Line => "line",
        };
        if args.json {
            let line = json!({
                "bench": "planner", "requests": requests, "context_tokens": context, "kind": kind,
                "mean_us": t.mean_us, "p50_us": t.p50_us, "p99_us": t.p99_us,
                "seals_per_step": t.seals, "steps": args.steps, "version": crate::cli::VERSION,
            });
            say!("{line}")?;
        } else {
            say!(
                "{requests:>9}{context:>10}{kind:>9}{:>11.2}{:>11.2}{:>11.2}{:>8.2}",
                t.mean_us,
                t.p50_us,
                t.p99_us,
                t.seals
            )?;
        }
    }
    Ok(())
}
