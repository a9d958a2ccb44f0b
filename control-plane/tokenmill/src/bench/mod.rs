//! `tokenmill bench`: measurements from outside (a running server), of the scheduler alone, and of
//! kernels alone.
//!
//! It never starts a server; what is measured is what users reach. Invariant: figures printed were
//! measured in this run.

mod kernels;
mod overload;
mod planner;
mod plot;
mod server;
mod sweep;

use crate::cli::{BenchCommand, LatencyArgs, Target, ThroughputArgs};
use crate::out::{in_full, say, say_part};
use crate::terminal::bar;
use anyhow::{Context, Result, ensure};
use load::{Client, Load, Prompts, Report};
use serde_json::{Value, json};
use server::{Scrape, Server};
use std::fmt;

/// What is to be measured is not on this machine; nothing failed.
#[derive(Debug, thiserror::Error)]
#[error("there is nothing to measure here: {0}")]
pub(crate) struct Unavailable(String);

/// Runs a measurement.
pub(crate) fn run(command: BenchCommand) -> Result<()> {
    let measured = match command {
        BenchCommand::Kernels(args) if args.list => return kernels::run(&args),
        BenchCommand::Kernels(args) => kernels::run(&args),
        BenchCommand::Planner(args) => planner::run(&args),
        BenchCommand::Overload(args) => overload::run(&args),
        BenchCommand::Latency(args) => block_on(latency(args)),
        BenchCommand::Throughput(args) => block_on(throughput(args)),
        BenchCommand::Serve(args) => block_on(sweep::run(args)),
        BenchCommand::Plot(args) => return plot::run(&args),
    };
    in_full(measured, "what was to be measured behind the last line was not")
}

fn block_on(work: impl Future<Output = Result<()>>) -> Result<()> {
    tokio::runtime::Runtime::new().context("start the runtime")?.block_on(work)
}

async fn latency(args: LatencyArgs) -> Result<()> {
    let client = connect(&args.target).await?;
    let warm_up = Load { requests: 1, ..load_of(&args.target, 1) };
    load::run(&client, warm_up, || ()).await;
    let load = Load { requests: args.repeats, ..load_of(&args.target, 0) };
    finish("latency", &client, &args.target, measure(&client, load).await)
}

async fn throughput(args: ThroughputArgs) -> Result<()> {
    let client = connect(&args.target).await?;
    let load = Load {
        requests: args.num_prompts,
        concurrency: args.num_prompts,
        ..load_of(&args.target, 0)
    };
    finish("throughput", &client, &args.target, measure(&client, load).await)
}

async fn connect(target: &Target) -> Result<Client> {
    Client::connect(&target.url, None)
        .await
        .with_context(|| format!("reach {}; start one with `tokenmill serve`", target.url))
}

/// The `number`-th load of a run: no two share prompts, or a cache of prefixes would serve the later one.
fn load_of(target: &Target, number: u64) -> Load {
    let seed = target.seed.wrapping_add(number.rotate_left(32));
    let prompts = Prompts { length: target.input_len, vocab: target.vocab_size, seed };
    Load { requests: 0, concurrency: 1, rate: None, prompts, output: target.output_len }
}

/// What a load amounted to, from outside and by the server's own account.
struct Measured {
    report: Report,
    server: Option<Server>,
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { report, server } = self;
        write!(f, "{report}")?;
        server.as_ref().map_or(Ok(()), |server| write!(f, "{server}"))
    }
}

async fn measure(client: &Client, load: Load) -> Measured {
    let before = Scrape::of(client).await;
    let progress = bar(u64::from(load.requests), "requests");
    let report = load::run(client, load, || progress.inc(1)).await;
    progress.finish_and_clear();
    let after = Scrape::of(client).await;
    let server = before.zip(after).map(|(before, after)| Server::between(&before, &after));
    Measured { report, server }
}

fn finish(kind: &str, client: &Client, target: &Target, measured: Measured) -> Result<()> {
    if target.json {
        say!("{}", line(kind, client, target, &measured))?;
    } else {
        say!("model         {}", client.model())?;
        say_part!("{measured}")?;
    }
    let report = measured.report;
    ensure!(report.failed == 0, "{} of the requests failed", report.failed);
    Ok(())
}

/// A measurement as one object.
fn line(kind: &str, client: &Client, target: &Target, measured: &Measured) -> Value {
    let Measured { report, server } = measured;
    json!({
        "bench": kind, "model": client.model(), "input_len": target.input_len,
        "output_len": target.output_len, "version": crate::cli::VERSION, "report": report,
        "server": server.as_ref().map(Server::value),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_of_a_run_share_no_prompt() {
        let target = Target {
            url: String::new(),
            input_len: 8,
            vocab_size: 1000,
            output_len: 1,
            seed: 7,
            json: false,
        };
        let all = |number| (0..50).map(move |index| (number, index));
        let mut prompts: Vec<Vec<u32>> = (0..5)
            .flat_map(all)
            .map(|(number, index)| load_of(&target, number).prompts.tokens(index))
            .collect();
        prompts.sort();
        prompts.dedup();
        assert_eq!(prompts.len(), 250);
        // The first load is that of the seed alone.
        assert_eq!(load_of(&target, 0).prompts.seed, 7);
    }
}
