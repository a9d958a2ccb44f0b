//! Flags of `bench`.

use clap::{Args, Subcommand};
use std::path::PathBuf;

/// What to measure.
#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Every kernel on a device: whether it is right, microseconds, share of what the device gives.
    Kernels(KernelsArgs),
    /// One request at a time against a server: time to first token, time per token.
    Latency(LatencyArgs),
    /// All requests at once against a server: tokens per second.
    Throughput(ThroughputArgs),
    /// A request rate or concurrency against a server: TTFT, TPOT, ITL, E2E percentiles.
    Serve(ServeBenchArgs),
    /// Recorded sweeps as a plot: tokens/s per user against tokens/s per GPU.
    Plot(PlotArgs),
    /// The scheduler alone: microseconds per step by requests and context.
    Planner(PlannerArgs),
    /// The scheduler in virtual time with up to ten times the work it can take: goodput, recovery,
    /// shares of tenants, waits of the least urgent.
    Overload(OverloadArgs),
}

/// `bench kernels`.
#[derive(Debug, Clone, Args)]
pub(crate) struct KernelsArgs {
    /// Only kernels whose names contain one of these, like mla,moe.v2_lite.bs1.
    #[arg(long, value_delimiter = ',')]
    pub(crate) filter: Vec<String>,
    /// Print names alone; needs no device.
    #[arg(long)]
    pub(crate) list: bool,
    /// Print one JSON object per kernel instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
    /// Append a JSON line for each kernel to this file.
    #[arg(long)]
    pub(crate) record: Option<PathBuf>,
    /// Time nothing: check each kernel, launch it once more where a profiler looks that waits for the
    /// program (ncu --profile-from-start off), and print its name and how many launches that were.
    #[arg(long, conflicts_with_all = ["json", "record"])]
    pub(crate) profile: bool,
}

/// What every measurement of a server needs.
#[derive(Debug, Clone, Args)]
pub(crate) struct Target {
    /// Where the server listens.
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    pub(crate) url: String,
    /// Tokens of each prompt, drawn at random.
    #[arg(long, default_value_t = 128)]
    pub(crate) input_len: u32,
    /// Prompts are drawn from the token ids below this; give the model's vocabulary.
    #[arg(long, default_value_t = 256)]
    pub(crate) vocab_size: u32,
    /// Tokens generated per request, to the last (`ignore_eos`).
    #[arg(long, default_value_t = 128)]
    pub(crate) output_len: u32,
    /// Seed of prompts and arrivals.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `bench latency`.
#[derive(Debug, Clone, Args)]
pub(crate) struct LatencyArgs {
    #[command(flatten)]
    pub(crate) target: Target,
    /// Requests measured, after one warm-up.
    #[arg(long, default_value_t = 5)]
    pub(crate) repeats: u32,
}

/// `bench throughput`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ThroughputArgs {
    #[command(flatten)]
    pub(crate) target: Target,
    /// Requests sent at once.
    #[arg(long, default_value_t = 64)]
    pub(crate) num_prompts: u32,
}

/// `bench serve`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ServeBenchArgs {
    #[command(flatten)]
    pub(crate) target: Target,
    /// Requests of each load: 100, or where there are several loads twice the concurrency, at least 4.
    #[arg(long)]
    pub(crate) num_prompts: Option<u32>,
    /// Requests in flight at once; several, like 1,4,16,64, are a sweep.
    #[arg(long, value_delimiter = ',', default_value = "16")]
    pub(crate) max_concurrency: Vec<u32>,
    /// Arrivals per second (Poisson); as fast as the concurrency allows when left out.
    #[arg(long)]
    pub(crate) request_rate: Option<f64>,
    /// Requests sent one by one before the first load, and not counted.
    #[arg(long, default_value_t = 1)]
    pub(crate) warm_up: u32,
    /// The server has just started: nothing warms it up, and the load is measured once more, to compare
    /// the first requests' time to first token with the steady one.
    #[arg(long)]
    pub(crate) cold_start: bool,
    /// Append a JSON line for each load to this file, for `bench plot`.
    #[arg(long)]
    pub(crate) record: Option<PathBuf>,
    /// What the server is called in the recorded lines.
    #[arg(long, default_value = "tokenmill")]
    pub(crate) label: String,
    /// GPUs behind the server.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) gpus: u32,
}

/// `bench plot`.
#[derive(Debug, Clone, Args)]
pub(crate) struct PlotArgs {
    /// Files that `bench serve --record` wrote, of any servers.
    #[arg(required = true)]
    pub(crate) files: Vec<PathBuf>,
    /// The SVG file to write.
    #[arg(long, default_value = "pareto.svg")]
    pub(crate) out: PathBuf,
    /// Written above the plot; made from the loads when left out.
    #[arg(long)]
    pub(crate) title: Option<String>,
}

/// `bench planner`.
#[derive(Debug, Clone, Args)]
pub(crate) struct PlannerArgs {
    /// Print one JSON object per case.
    #[arg(long)]
    pub(crate) json: bool,
    /// Steps timed per case.
    #[arg(long, default_value_t = 2000)]
    pub(crate) steps: u32,
}

/// `bench overload`.
#[derive(Debug, Clone, Args)]
pub(crate) struct OverloadArgs {
    /// Print one JSON object per figure.
    #[arg(long)]
    pub(crate) json: bool,
    /// Seed of arrivals and lengths.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Write the plots to this folder: overload.svg, fairness.svg, fairness-arrival.svg.
    #[arg(long)]
    pub(crate) plots: Option<PathBuf>,
}
