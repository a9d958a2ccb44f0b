//! Runs seeded worlds and prints what they did; a violation prints the command that shows it.
//!
//! `cargo run -p sim -- --seed 7 --events 100000` replays one world; `--seeds 50` runs a range,
//! `--minutes 60` as many as there is time for.

#![allow(clippy::print_stdout)]

use anyhow::Context;
use clap::{Parser, ValueEnum};
use sim::act::Act;
use sim::figures::{ENDS, Fault, PLACED};
use sim::scenario::Model;
use sim::shrink::shrink;
use sim::{Figures, Scenario, World};
use std::time::{Duration, Instant};

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
    /// Run seed after seed until so many minutes have passed, whatever --seeds says.
    #[arg(long)]
    minutes: Option<u64>,
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
    /// Tell tenants apart, with patience and a look ahead at deadlines; not compared with the model.
    #[arg(long)]
    shared: bool,
    /// Blocks of each group that the memory behind the cache holds; what the seed says when left out.
    #[arg(long)]
    behind: Option<u32>,
    /// Let nothing happen but these acts of the seed, as --shrink prints them: a12,s40,m7.
    #[arg(long, value_delimiter = ',')]
    only: Option<Vec<Act>>,
    /// Find the few acts with which a violation still shows.
    #[arg(long, conflicts_with = "only")]
    shrink: bool,
    /// Print the sum of all runs as one JSON object instead of a line for each.
    #[arg(long)]
    json: bool,
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
    let begin = Instant::now();
    let limit = options.minutes.map(|minutes| Duration::from_secs(60 * minutes));
    let last = match limit {
        Some(_) => u64::MAX,
        None => options.seed.saturating_add(options.seeds),
    };
    let mut sum = Figures::default();
    'seeds: for seed in options.seed..last {
        for model in &models {
            for depth in &depths {
                if limit.is_some_and(|limit| begin.elapsed() >= limit) {
                    break 'seeds;
                }
                let figures = run(&options, seed, *model, *depth)?;
                sum.add(&figures);
                if !options.json {
                    print(seed, *model, *depth, &figures);
                }
            }
        }
    }
    if options.json {
        println!(
            "{{\"bench\":\"sim\",\"seconds\":{:.0},\"events_per_run\":{},\"violations\":0,{}}}",
            begin.elapsed().as_secs_f64(),
            options.events,
            sum.json()
        );
    }
    Ok(())
}

fn run(options: &Options, seed: u64, model: Model, depth: u32) -> anyhow::Result<Figures> {
    let events = options.events;
    let storm = Scenario::storm(seed, events, depth, model).context("carve the cache")?;
    let storm = if options.calm { storm.calm() } else { storm };
    let storm = if options.shared { storm.shared() } else { storm };
    let scenario = match options.behind {
        Some(host_blocks) => storm.behind(host_blocks),
        None => storm,
    };
    let calm = if options.calm { " --calm" } else { "" };
    let shared = if options.shared { " --shared" } else { "" };
    let behind = options.behind.map(|n| format!(" --behind {n}")).unwrap_or_default();
    let replay = format!(
        "cargo run -p sim -- --seed {seed} --events {events} --depth {depth} --model \
         {model:?}{calm}{shared}{behind}"
    );
    let world = World::new(scenario.clone()).context("check the limits")?;
    let world = match &options.only {
        Some(acts) => world.only(acts.iter().copied()),
        None => world,
    };
    world.run().map_err(|violation| {
        if options.shrink
            && let Some(shrunk) = shrink(&scenario)
        {
            let acts: Vec<_> = shrunk.acts.iter().map(Act::to_string).collect();
            println!(
                "{}\nafter {} runs: {replay} --only {}",
                shrunk.what,
                shrunk.runs,
                acts.join(",")
            );
        }
        anyhow::Error::new(violation).context(format!("replay with: {replay}"))
    })
}

fn print(seed: u64, model: Model, depth: u32, figures: &Figures) {
    let gauges = &figures.gauges;
    let named = |names: &[&str], values: &[u64]| {
        let each = values.iter().zip(names).map(|(n, name)| format!("{n} {name}"));
        each.collect::<Vec<_>>().join(", ")
    };
    println!(
        "seed {seed} {model:?} depth {depth}: {} events, {:.1} s, {} steps ({} % with a full \
         cache), {} requests in {} sessions ({} refused), {} tokens; ended: {}; faults: {}; {} \
         preemptions, {} deaths, {} purges, {} of {} prompt tokens cached, {} of them behind the cache \
         ({} blocks stored, {} loaded, full in {} of {} steps), longest wait {:.1} s, \
         digest {:016x}",
        figures.events,
        figures.time.0 as f64 / 1e9,
        figures.steps,
        figures.full_cache_steps * 100 / figures.steps.max(1),
        figures.requests,
        figures.sessions,
        figures.refused,
        figures.tokens,
        named(&ENDS, &figures.ends),
        named(&Fault::ALL.map(|(_, name)| name), &figures.faults),
        gauges.preemptions,
        gauges.deaths,
        gauges.purges,
        gauges.prefix_hit_tokens,
        gauges.prefix_query_tokens,
        gauges.host_hit_tokens,
        gauges.host_stores,
        gauges.host_loads,
        figures.full_tier_steps,
        figures.tiered_steps,
        figures.longest_wait.as_secs_f64(),
        figures.digest,
    );
    if figures.several > 0 {
        println!(
            "  several shards: placed by {}; {} times one stood still, {} lives whose ranks disagreed",
            named(&PLACED, &figures.placements),
            figures.still,
            figures.divergences,
        );
    }
}
