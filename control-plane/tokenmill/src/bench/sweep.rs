//! `bench serve`: one load on a server, or one after another at several concurrencies.
//!
//! Invariant: a recorded line is of a load all of whose requests ended as they should.

use super::{connect, line, load_of, measure};
use crate::cli::ServeBenchArgs;
use crate::out::{say, say_part};
use anyhow::{Context, Result, ensure};
use load::Load;
use serde_json::{Value, json};
use std::fs::File;
use std::io::Write;

/// Requests of a load where none are named: alone, and in a sweep per request in flight and at least.
const ALONE: u32 = 100;
const EACH: u32 = 2;
const LEAST: u32 = 4;

fn requests(args: &ServeBenchArgs, concurrency: u32) -> u32 {
    args.num_prompts.unwrap_or(match args.max_concurrency.as_slice() {
        [_] => ALONE,
        _ => concurrency.saturating_mul(EACH).max(LEAST),
    })
}

/// Measures every load.
pub(super) async fn run(args: ServeBenchArgs) -> Result<()> {
    let named = !args.max_concurrency.is_empty() && !args.max_concurrency.contains(&0);
    ensure!(named, "--max-concurrency takes numbers from 1, separated by commas");
    let mut record = args.record.as_ref().map(|path| {
        let file = File::options().create(true).append(true).open(path);
        file.with_context(|| format!("open {} to append to it", path.display()))
    });
    let mut record = record.take().transpose()?;
    let client = connect(&args.target).await?;
    let mut loads = args.max_concurrency.clone();
    if args.cold_start {
        ensure!(loads.len() == 1, "--cold-start compares two loads of one concurrency");
        loads.push(loads[0]);
    } else if args.warm_up > 0 {
        // Prompts of a number that no load has.
        let load = Load { requests: args.warm_up, ..load_of(&args.target, u64::from(u32::MAX)) };
        load::run(&client, load, || ()).await;
    }
    let mut first_tokens = Vec::new();
    for (number, &concurrency) in (0..).zip(&loads) {
        let load = Load {
            requests: requests(&args, concurrency),
            concurrency,
            rate: args.request_rate,
            ..load_of(&args.target, number)
        };
        let measured = measure(&client, load).await;
        let mut told = line("serve", &client, &args.target, &measured);
        let report = &measured.report;
        first_tokens.push(report.ttft_ms.p99);
        if let Value::Object(fields) = &mut told {
            let more = json!({"label": args.label, "gpus": args.gpus, "concurrency": concurrency});
            fields.extend(
                more.as_object().into_iter().flatten().map(|(k, v)| (k.clone(), v.clone())),
            );
        }
        if args.target.json {
            say!("{told}")?;
        } else {
            if number == 0 {
                say!("model         {}", client.model())?;
            }
            say!("concurrency   {concurrency}")?;
            say_part!("{measured}")?;
        }
        ensure!(report.failed == 0, "{} of the requests failed", report.failed);
        if let Some(file) = &mut record {
            writeln!(file, "{told}").context("append to the record")?;
        }
    }
    if let (true, [first, steady]) = (args.cold_start, first_tokens.as_slice()) {
        let requests = requests(&args, loads[0]);
        if args.target.json {
            let line = json!({
                "bench": "cold_start", "model": client.model(), "requests": requests,
                "ttft_p99_ms": first, "steady_ttft_p99_ms": steady, "ratio": first / steady,
                "version": crate::cli::VERSION,
            });
            say!("{line}")?;
        } else {
            say!(
                "first token   p99 of the first {requests} requests {first:.2} ms, after them \
                 {steady:.2} ms: {:.2} times",
                first / steady
            )?;
        }
    }
    Ok(())
}
