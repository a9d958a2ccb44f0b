//! Flags of `bench`.

use clap::{Args, Subcommand};

/// What to measure.
#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// One request at a time against a server: time to first token, time per token.
    Latency(LatencyArgs),
    /// All requests at once against a server: tokens per second.
    Throughput(ThroughputArgs),
    /// A request rate or concurrency against a server: TTFT, TPOT, ITL, E2E percentiles.
    Serve(ServeBenchArgs),
    /// The scheduler alone: microseconds per step by requests and context.
    Planner(PlannerArgs),
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
    /// Requests in all.
    #[arg(long, default_value_t = 100)]
    pub(crate) num_prompts: u32,
    /// Requests in flight at once.
    #[arg(long, default_value_t = 16)]
    pub(crate) max_concurrency: u32,
    /// Arrivals per second (Poisson); as fast as the concurrency allows when left out.
    #[arg(long)]
    pub(crate) request_rate: Option<f64>,
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
