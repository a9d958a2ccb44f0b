//! `bench overload`: the shipped scheduler in virtual time with more work than it can take.
//!
//! Loads, settings and judgement are those of `sim::curves`, which tests hold to their bounds; here
//! they become lines and plots. Invariant: equal seeds print equal lines.

use crate::cli::OverloadArgs;
use crate::out::say;
use anyhow::{Context, Result};
use load::{Line, draw_lines};
use serde_json::{Value, json};
use sim::curves::{self, Capacity, Load, Policy, Shares};
use std::fs;
use std::path::Path;

/// Offered loads, as multiples of the capacity.
const OFFERED: [f64; 10] = [0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0];
const POLICIES: [Policy; 2] = [Policy::Served, Policy::Arrival];
/// [`sim::overload::Way`] in its order.
const WAYS: [&str; 6] = ["done", "missed", "waited", "unreachable", "full", "shed"];

/// Measures and prints all of it.
pub(crate) fn run(args: &OverloadArgs) -> Result<()> {
    let capacity = curves::capacity(args.seed);
    let print = |bench: &str, figures: Value| -> Result<()> {
        if args.json {
            let mut line = json!({"bench": bench, "seed": args.seed});
            if let (Some(line), Value::Object(figures)) = (line.as_object_mut(), figures) {
                line.extend(figures);
                line.insert("version".into(), crate::cli::VERSION.into());
            }
            say!("{line}")?;
        } else {
            say!("{bench}: {figures}")?;
        }
        Ok(())
    };
    print(
        "overload.capacity",
        json!({
            "requests_per_s": capacity.requests, "output_tokens_per_s": capacity.output,
            "virtual_tokens_per_s": capacity.virtual_tokens,
        }),
    )?;
    let mut goodput = Vec::new();
    for policy in POLICIES {
        let mut points = Vec::new();
        for offered in OFFERED {
            let load = curves::load(args.seed, capacity, offered, policy);
            print("overload.load", of_load(policy, &load))?;
            points.push((offered, load.goodput));
        }
        goodput.push(Line { name: policy.name().into(), points });
    }
    let took = curves::recovery(args.seed, capacity, 10.0);
    let (served, empty) = (took.served.as_secs_f64(), took.empty.as_secs_f64());
    print(
        "overload.recovery",
        json!({"offered": 10.0, "turned_away_until_s": served, "queue_empty_after_s": empty}),
    )?;
    let mut plots = vec![("overload.svg", goodput_plot(capacity, &goodput)?)];
    for (policy, file) in POLICIES.into_iter().zip(["fairness.svg", "fairness-arrival.svg"]) {
        let shares = curves::shares(args.seed, capacity, policy);
        print("overload.fairness", of_shares(policy, &shares))?;
        plots.push((file, shares_plot(policy, &shares)?));
    }
    for patience in [16, 0] {
        let least = curves::least_urgent(args.seed, capacity, patience);
        let figures = json!({
            "patience": patience, "requests": least.requests, "done": least.done, "full": least.full,
            "longest_wait_s": least.longest.as_secs_f64(), "bound_s": least.bound.as_secs_f64(),
            "urgent_p99_wait_s": least.urgent_p99.as_secs_f64(),
        });
        print("overload.least_urgent", figures)?;
    }
    if let Some(folder) = &args.plots {
        for (file, svg) in plots {
            write(&folder.join(file), &svg)?;
        }
    }
    Ok(())
}

fn of_load(policy: Policy, load: &Load) -> Value {
    let ways: serde_json::Map<String, Value> =
        WAYS.into_iter().map(String::from).zip(load.ways.map(Value::from)).collect();
    json!({
        "policy": policy.name(), "offered": load.offered, "goodput_tokens_per_s": load.goodput,
        "throughput_tokens_per_s": load.throughput, "requests": load.requests, "ended": ways,
        "queued_most": load.queued_most, "queued_tokens_most": load.queued_tokens_most,
        "wait_p50_s": load.wait_s[0], "wait_p99_s": load.wait_s[1],
    })
}

fn of_shares(policy: Policy, shares: &Shares) -> Value {
    let served = shares.record.samples.last().map(|sample| sample.served.clone());
    json!({
        "policy": policy.name(), "demand": shares.demand, "jain": shares.jain,
        "drift_virtual_tokens": shares.drift, "bound_virtual_tokens": shares.bound,
        "served_virtual_tokens": served,
    })
}

fn goodput_plot(capacity: Capacity, curves: &[Line]) -> Result<String> {
    let title = format!("Goodput under load; the capacity is {:.1} requests/s", capacity.requests);
    let y = "output tokens/s of requests within their 10 s";
    draw_lines(&title, "offered load, multiples of the capacity", y, curves).context("draw goodput")
}

fn shares_plot(policy: Policy, shares: &Shares) -> Result<String> {
    let line = |tenant: usize| Line {
        name: format!("demand {} of the capacity", shares.demand[tenant]),
        points: (shares.record.samples.iter())
            .filter(|sample| sample.at.0 <= 60_000_000_000)
            .map(|sample| (sample.at.0 as f64 / 1e9, sample.served[tenant] as f64 / 1e3))
            .collect(),
    };
    let lines: Vec<Line> = (0..shares.demand.len()).map(line).collect();
    let title = format!("Five tenants, {}; the last pauses from 20 to 40 s", policy.name());
    draw_lines(&title, "seconds", "thousand virtual tokens served", &lines).context("draw shares")
}

fn write(path: &Path, svg: &str) -> Result<()> {
    fs::write(path, svg).with_context(|| format!("write {}", path.display()))
}
