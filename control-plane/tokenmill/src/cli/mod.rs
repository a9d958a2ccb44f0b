//! The command line: every flag with its unit, default and when to change it.
//!
//! Parsing only; nothing here acts. Names are those vLLM users know wherever the meaning is the
//! same. Invariant: a flag that is parsed is read (docs/reference/cli.md lists them all, and a
//! test compares).

mod bench;
mod serve;

pub(crate) use bench::{
    BenchCommand, KernelsArgs, LatencyArgs, OverloadArgs, PlannerArgs, PlotArgs, ServeBenchArgs,
    Target, ThroughputArgs,
};
pub(crate) use serve::{Dtype, ServeArgs};

use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// Version with the commit it was built from.
pub(crate) const VERSION: &str =
    concat!(env!("CARGO_PKG_VERSION"), " (", env!("TOKENMILL_COMMIT"), ")");

/// A serving engine for large language models: one binary, no Python.
///
/// Start with `tokenmill serve`: it serves the bundled demo model on 127.0.0.1:8000. Then
/// `tokenmill serve /path/to/checkpoint`, `tokenmill serve ORG/NAME`, or a recipe.
#[derive(Debug, Parser)]
#[command(name = "tokenmill", version = VERSION, propagate_version = true)]
pub(crate) struct Cli {
    /// What to do; `serve` when left out.
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve a model over HTTP.
    Serve(Box<ServeArgs>),
    /// Talk to a running server from the terminal; Ctrl-C stops the answer, Ctrl-D leaves.
    Chat(ChatArgs),
    /// Where one request's time went, step by step: in line and for what, in which steps and who shared
    /// them, on its way back. Asks the server that answered it.
    Explain(ExplainArgs),
    /// Measure: kernels, single-request latency, offline throughput, a running server, the planner.
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Look at, make or fetch model folders.
    #[command(subcommand)]
    Model(ModelCommand),
    /// Look at deployment recipes.
    #[command(subcommand)]
    Recipe(RecipeCommand),
    /// Check this machine: what can run here, and what is missing.
    Doctor,
    /// Print a completion script: `tokenmill completions bash > ~/.local/share/bash-completion/completions/tokenmill`.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// One worker process; started by `serve`.
    #[command(hide = true)]
    Worker(WorkerArgs),
}

/// Arguments of `chat`.
#[derive(Debug, Args)]
pub(crate) struct ChatArgs {
    /// Where the server listens.
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    pub(crate) url: String,
    /// Model to talk to; the server's first when left out.
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// A system message put before the conversation.
    #[arg(long)]
    pub(crate) system: Option<String>,
    /// Most tokens of one answer.
    #[arg(long, default_value_t = 512)]
    pub(crate) max_tokens: u32,
    /// 0 is greedy; the model's own default when left out.
    #[arg(long)]
    pub(crate) temperature: Option<f32>,
}

/// Arguments of `explain`.
#[derive(Debug, Args)]
pub(crate) struct ExplainArgs {
    /// The request: a reply's x-request-id or id, or the number of a generation that another
    /// explanation names.
    pub(crate) request: String,
    /// Where the server listens. On another machine it wants its TOKENMILL_ADMIN_KEY, which is taken from
    /// the environment.
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    pub(crate) url: String,
    /// Print every step, not the slowest alone.
    #[arg(long)]
    pub(crate) steps: bool,
    /// Print one JSON object with all that is known instead of a page.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Commands on model folders.
#[derive(Debug, Subcommand)]
pub(crate) enum ModelCommand {
    /// Print the op list a rank runs, with the kernel each op selects on this machine and bytes of
    /// weights, KV and collectives.
    Explain {
        /// A model folder or its config.json.
        model: PathBuf,
        /// Tensor-parallel ranks.
        #[arg(long, default_value_t = 1)]
        tp: u32,
        /// Data-parallel shards.
        #[arg(long, default_value_t = 1)]
        dp: u32,
        /// Spread experts over all ranks.
        #[arg(long)]
        ep: bool,
        /// Padded tokens of a step.
        #[arg(long, default_value_t = 1)]
        bucket: u32,
    },
    /// Write a checkpoint of random weights for a config.json: for load tests without a download.
    Random {
        /// The config.json whose shapes to fill.
        config: PathBuf,
        /// Folder to write; created, must be empty.
        #[arg(long)]
        out: PathBuf,
        /// Seed of the weights; the same seed gives the same bytes everywhere.
        #[arg(long, default_value_t = 0)]
        seed: u64,
        /// Element type of the matrices.
        #[arg(long, default_value = "auto")]
        dtype: Dtype,
        /// How weights are scaled: `realistic` for load tests, `parity` as the reference data of
        /// the test-suite.
        #[arg(long, default_value = "realistic")]
        profile: RandomProfile,
    },
    /// Download a model from the hub, every file from one revision.
    Fetch {
        /// ORG/NAME on the hub.
        repo: String,
        /// Branch, tag or commit.
        #[arg(long, default_value = "main")]
        revision: String,
    },
}

/// How random weights are scaled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum RandomProfile {
    /// Normal, 1/sqrt(fan_in); routers touch experts evenly.
    Realistic,
    /// As the parity references were made.
    Parity,
}

/// Commands on recipes.
#[derive(Debug, Subcommand)]
pub(crate) enum RecipeCommand {
    /// List the recipes built into the binary.
    List,
    /// Check recipes: fields, limits, and that the memory plan adds up.
    Check {
        /// Recipe files or built-in names; all built-in ones when left out.
        recipes: Vec<String>,
    },
    /// Print the processes and the memory plan a recipe leads to.
    Plan {
        /// A recipe file or a built-in name.
        recipe: String,
    },
    /// Print every setting of a recipe with what it does and where its value comes from.
    Explain {
        /// A recipe file or a built-in name.
        recipe: String,
    },
}

/// Arguments of a worker process.
#[derive(Debug, Args)]
pub(crate) struct WorkerArgs {
    /// Socket to serve.
    #[arg(long)]
    pub(crate) socket: PathBuf,
    /// The configuration as JSON.
    #[arg(long)]
    pub(crate) config: String,
}
