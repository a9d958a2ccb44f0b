//! Runs seeded worlds and prints what they did; a violation prints the seed that shows it.
//!
//! `cargo run -p sim -- --seed 7 --events 100000` replays one world; `--seeds 50` runs a range.

#![allow(clippy::print_stdout)]

use anyhow::Context;
use clap::{Parser, ValueEnum};
use sim::scenario::Model;
use sim::{Figures, Scenario, World};

/// Simulate the scheduler in seeded, faulty worlds.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// First seed.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Number of seeds.
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// Events after which no more requests come.
    #[arg(long, default_value_t = 100_000)]
    events: u64,
    /// Steps planned ahead; all of 0, 1 and 2 when left out.
    #[arg(long)]
    depth: Option<u32>,
    /// Cache groups of the model; all kinds when left out.
    #[arg(long, value_enum, ignore_case = true)]
    model: Option<Kind>,
    /// Leave out everything that goes wrong.
    #[arg(long)]
    calm: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Kind {
    Full,
    Sliding,
    Mixed,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let models = match options.model {
        Some(Kind::Full) => vec![Model::Full],
        Some(Kind::Sliding) => vec![Model::Sliding],
        Some(Kind::Mixed) => vec![Model::Mixed],
        None => vec![Model::Full, Model::Sliding, Model::Mixed],
    };
    let depths = options.depth.map_or(vec![0, 1, 2], |depth| vec![depth]);
    for seed in options.seed..options.seed.saturating_add(options.seeds) {
        for model in &models {
            for depth in &depths {
                let storm = Scenario::storm(seed, options.events, *depth, *model)
                    .context("carve the cache")?;
                let scenario = if options.calm { storm.calm() } else { storm };
                let world = World::new(scenario).context("check the limits")?;
                let figures = world.run().with_context(|| {
                    format!(
                        "replay with: cargo run -p sim -- --seed {seed} --events {} --depth \
                         {depth} --model {model:?}",
                        options.events
                    )
                })?;
                print(seed, *model, *depth, &figures);
            }
        }
    }
    Ok(())
}

fn print(seed: u64, model: Model, depth: u32, figures: &Figures) {
    let gauges = &figures.gauges;
    let [natural, stopped, aborted, late, died] = figures.ends;
    println!(
        "seed {seed} {model:?} depth {depth}: {} events, {:.1} s, {} steps ({} % with a full \
         cache), {} requests ({} refused), {} tokens; ended: {natural} naturally, {stopped} by \
         stop string, {aborted} aborted, {late} by deadline, {died} by deaths; {} preemptions, {} \
         deaths, {} purges, {} of {} prompt tokens cached, longest wait {:.1} s, digest {:016x}",
        figures.events,
        figures.time.0 as f64 / 1e9,
        figures.steps,
        figures.full_cache_steps * 100 / figures.steps.max(1),
        figures.requests,
        figures.refused,
        figures.tokens,
        gauges.preemptions,
        gauges.deaths,
        gauges.purges,
        gauges.prefix_hit_tokens,
        gauges.prefix_query_tokens,
        figures.longest_wait.as_secs_f64(),
        figures.digest,
    );
}
