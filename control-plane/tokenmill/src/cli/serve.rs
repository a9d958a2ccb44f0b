//! Flags of `serve`.

use crate::serve::device::DeviceArg;
use crate::serve::worker_config::{KvDtype, LoadFormat, PlantedArg};
use clap::Args;
use std::net::IpAddr;

/// Serve a model over HTTP, with an OpenAI-compatible API.
///
/// Examples:
///   tokenmill serve                                  the bundled demo model
///   tokenmill serve ./DeepSeek-V2-Lite               a checkpoint folder
///   tokenmill serve Qwen/Qwen3-0.6B                  fetched from the hub
///   tokenmill serve qwen3-0.6b-cpu                   a recipe, built in or a .toml file
///   tokenmill serve ./config-only --load-format random --dtype bfloat16
#[derive(Debug, Clone, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct ServeArgs {
    /// A checkpoint folder, ORG/NAME on the hub, or a recipe; the bundled model when left out.
    pub(crate) model: Option<String>,

    /// Address to listen on. Loopback by default: there is no authentication.
    #[arg(long, default_value = "127.0.0.1", help_heading = "HTTP")]
    pub(crate) host: IpAddr,
    /// Port to listen on; 0 takes a free one and prints it.
    #[arg(long, default_value_t = 8000, help_heading = "HTTP")]
    pub(crate) port: u16,
    /// Names clients may use for the model; the folder's or repository's name when left out.
    #[arg(long, num_args = 1.., help_heading = "HTTP")]
    pub(crate) served_model_name: Vec<String>,
    /// Seconds that running requests may take to finish after SIGTERM; a second signal ends at once.
    #[arg(long, default_value_t = 30, help_heading = "HTTP")]
    pub(crate) shutdown_timeout: u64,

    /// Element type of weights made by `--load-format random` and of the KV cache. On the CPU a
    /// checkpoint's weights are used in the type they are stored in; a CUDA device computes in
    /// bfloat16, or in float32 where that is given.
    #[arg(long, default_value = "auto", help_heading = "Model")]
    pub(crate) dtype: Dtype,
    /// Where the weights come from.
    #[arg(long, default_value = "auto", help_heading = "Model")]
    pub(crate) load_format: LoadFormat,
    /// Branch, tag or commit of a hub repository.
    #[arg(long, default_value = "main", help_heading = "Model")]
    pub(crate) revision: String,
    /// Seed of random weights, and of requests that give none (0 draws one per request).
    #[arg(long, default_value_t = 0, help_heading = "Model")]
    pub(crate) seed: u64,
    /// Longest context, prompt and output, in tokens; the model's own when left out.
    #[arg(long, help_heading = "Model")]
    pub(crate) max_model_len: Option<u32>,
    /// A Jinja chat template file instead of the model's own.
    #[arg(long, help_heading = "Model")]
    pub(crate) chat_template: Option<std::path::PathBuf>,

    /// Most requests that run at once; each holds a slot.
    #[arg(long, default_value_t = 64, help_heading = "Scheduling")]
    pub(crate) max_num_seqs: u32,
    /// Most tokens of one step, prompt and decode together. Higher: more throughput, longer pauses
    /// between the tokens of running requests.
    #[arg(long, default_value_t = 1024, help_heading = "Scheduling")]
    pub(crate) max_num_batched_tokens: u32,
    /// Most prompt tokens of one request in one step.
    #[arg(long, help_heading = "Scheduling")]
    pub(crate) max_prefill_chunk: Option<u32>,
    /// Milliseconds a step with running decodes may take; prompt chunks shrink to fit. 0: no bound.
    #[arg(long, default_value_t = 0, help_heading = "Scheduling")]
    pub(crate) max_step_ms: u64,
    /// Steps launched ahead of the newest known result: 0, 1 or 2.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(0..=2), help_heading = "Scheduling")]
    pub(crate) run_ahead: u8,
    /// Requests that may wait; one more is answered 503 with Retry-After.
    #[arg(long, default_value_t = 1024, help_heading = "Scheduling")]
    pub(crate) max_queued_requests: u32,
    /// Prompt tokens that may wait; one more is answered 503 with Retry-After.
    #[arg(long, default_value_t = 4 << 20, help_heading = "Scheduling")]
    pub(crate) max_queued_tokens: u32,
    /// Compute every prompt anew instead of reusing the KV of equal prefixes.
    #[arg(long, help_heading = "Scheduling")]
    pub(crate) no_enable_prefix_caching: bool,

    /// Element type of the KV cache.
    #[arg(long, default_value = "auto", help_heading = "Memory")]
    pub(crate) kv_cache_dtype: KvDtype,
    /// Bytes of the KV cache; a share of free memory when left out.
    #[arg(long, help_heading = "Memory")]
    pub(crate) kv_cache_memory_bytes: Option<u64>,
    /// Bytes of the machine's memory, of each rank, that keep KV blocks for which the cache has no room, so
    /// that a prefix seen again is copied back instead of computed. 0: none.
    #[arg(long, default_value_t = 0, help_heading = "Memory")]
    pub(crate) kv_host_memory_bytes: u64,

    /// What runs the model. `auto`: a CUDA device where there is one that this build has kernels for,
    /// else the CPU; the log says which, and why.
    #[arg(long, default_value = "auto", help_heading = "Workers")]
    pub(crate) device: DeviceArg,
    /// Share of a CUDA device's free memory that weights, steps and KV cache may take.
    #[arg(long, default_value_t = 0.9, value_parser = share, help_heading = "Memory")]
    pub(crate) gpu_memory_utilization: f64,

    /// Ranks that split each layer, one process each; more than one on the CPU alone.
    #[arg(long, short = 't', default_value_t = 1, help_heading = "Workers")]
    pub(crate) tensor_parallel_size: u32,
    /// Shards with requests and a cache of their own; each is as many ranks as split a layer, and has
    /// `--max-num-seqs` and `--max-num-batched-tokens` for itself.
    #[arg(long, default_value_t = 1, help_heading = "Workers")]
    pub(crate) data_parallel_size: u32,
    /// Spread whole experts over all ranks instead of splitting each.
    #[arg(long, help_heading = "Workers")]
    pub(crate) enable_expert_parallel: bool,
    /// Threads of each rank of the CPU backend; all cores, shared among ranks, when left out.
    #[arg(long, help_heading = "Workers")]
    pub(crate) threads: Option<usize>,
    /// Bytes of the step journal, from which `tokenmill explain` tells where a request's time went; more
    /// reach further back. 0: none is kept.
    #[arg(long, default_value_t = 16 << 20, help_heading = "Scheduling")]
    pub(crate) journal_bytes: u64,
    /// Seconds a step may take before its worker is killed and restarted.
    #[arg(long, default_value_t = 120, help_heading = "Workers")]
    pub(crate) step_timeout: u64,
    /// Replace the engine by one without a model, for tests: BASE_US,DECODE_US,PREFILL_NS, and
    /// after one more comma the milliseconds that it takes to load.
    #[arg(long, hide = true, value_delimiter = ',', num_args = 1)]
    pub(crate) fake_engine: Option<Vec<u64>>,
    /// Make a launch of the first worker's steps fail, for tests: which one, from 1 on. CUDA only.
    #[arg(long, hide = true, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) fail_launch: Option<u64>,
    /// Let something go wrong in a rank of the first group, for tests: RANK,STEP,digest or token, or
    /// RANK,STEP,mute or deaf,MILLISECONDS.
    #[arg(long, hide = true)]
    pub(crate) plant_fault: Option<PlantedArg>,
    /// Let workers without a model end when a request runs that has this token in its prompt, eight
    /// tokens behind it, for tests.
    #[arg(long, hide = true)]
    pub(crate) poison_token: Option<u32>,
    /// Dial workers at their socket's path with this behind it, for tests that put something between.
    #[arg(long, hide = true)]
    pub(crate) dial_suffix: Option<String>,
    /// Milliseconds after which a client is given up that reads nothing, for tests.
    #[arg(long, hide = true)]
    pub(crate) write_stall_ms: Option<u64>,
    /// Let the scheduler's thread panic when it has planned this step, for tests.
    #[arg(long, hide = true)]
    pub(crate) panic_at_step: Option<u64>,
}

/// A share: above 0, at most 1.
fn share(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|error| format!("{error}"))?;
    if value > 0.0 && value <= 1.0 {
        Ok(value)
    } else {
        Err("must be above 0 and at most 1".to_owned())
    }
}

/// Element types a user can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Dtype {
    /// As the checkpoint says.
    Auto,
    /// 4 bytes an element.
    Float32,
    /// 2 bytes an element.
    Bfloat16,
}
