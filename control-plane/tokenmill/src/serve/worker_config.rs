//! What a worker process is told at its start. Internal: written by this binary, read by the same
//! binary, so unknown fields are refused.

use ids::{Rank, StepSeq};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::Duration;
use step::{Mesh, Seat};
use worker::{Planted, PlantedFault};

/// A worker's whole configuration.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WorkerConfig {
    /// What executes.
    pub(crate) engine: EngineConfig,
    /// Threads of the CPU backend.
    pub(crate) threads: usize,
    /// Vocabulary of the fake engine.
    pub(crate) fake_vocab: u32,
    /// Data-parallel shards of the group.
    pub(crate) dp: u32,
    /// Ranks of a shard.
    pub(crate) tp: u32,
    /// Whether experts are spread over all ranks.
    pub(crate) expert_parallel: bool,
    /// Which rank this is.
    pub(crate) rank: u32,
    /// Milliseconds that a rank waits for the others inside of one collective.
    pub(crate) patience_ms: u64,
    /// Where ranks of a model meet in this life.
    pub(crate) meeting: Option<Meeting>,
    /// What goes wrong in one rank, for tests; in the first life alone.
    pub(crate) planted: Option<PlantedArg>,
}

impl WorkerConfig {
    /// The configuration of one rank.
    pub(crate) fn of_rank(&self, rank: Rank, meeting: Option<&Path>) -> Self {
        let planted = self.planted.filter(|planted| planted.rank == rank.0);
        let patience_ms = self.patience_ms;
        let meeting = meeting.map(|path| Meeting { path: path.to_owned(), patience_ms });
        Self { rank: rank.0, planted, meeting, ..self.clone() }
    }

    /// Whether a model is run.
    pub(crate) const fn has_model(&self) -> bool {
        matches!(self.engine, EngineConfig::Model(_))
    }

    /// Where this worker is.
    pub(crate) const fn seat(&self) -> Seat {
        let mesh = Mesh { dp: self.dp, tp: self.tp, expert_parallel: self.expert_parallel };
        Seat { mesh, rank: Rank(self.rank) }
    }

    /// What the next life is told: faults are planted once.
    pub(crate) fn heal(&mut self) {
        self.planted = None;
        if let EngineConfig::Model(model) = &mut self.engine {
            model.failing_launch = None;
        }
    }
}

/// Where the ranks of a group exchange what collectives move.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Meeting {
    /// The shared memory.
    pub(crate) path: PathBuf,
    /// How long a rank waits for the others inside of one collective.
    pub(crate) patience_ms: u64,
}

/// What executes steps.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub(crate) enum EngineConfig {
    /// A model.
    Model(ModelConfig),
    /// No model: the cost model's time and hashed tokens.
    Fake {
        /// Microseconds of any step.
        base_us: u64,
        /// Microseconds per decoding slot.
        decode_us: u64,
        /// Nanoseconds per prompt token.
        prefill_ns: u64,
        /// Milliseconds until it is loaded.
        start_ms: u64,
        /// The prompt token that ends its process.
        poison: Option<u32>,
    },
}

/// A model and how it is held.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ModelConfig {
    /// Folder with `config.json` and the weights.
    pub(crate) path: PathBuf,
    /// What runs it.
    pub(crate) device: DeviceConfig,
    /// Where the weights come from.
    pub(crate) load_format: LoadFormat,
    /// Of random weights.
    pub(crate) seed: u64,
    /// Random weights in float32 whatever the configuration declares.
    pub(crate) random_float32: bool,
    /// Element type of the KV cache; decided, never `Auto`.
    pub(crate) kv_cache_dtype: KvDtype,
    /// Bytes of the KV cache.
    pub(crate) kv_cache_bytes: u64,
    /// Bytes of host memory behind it.
    pub(crate) kv_host_bytes: u64,
    /// Which launch of a device's steps is made to fail, for tests; of the first life alone.
    pub(crate) failing_launch: Option<u64>,
}

/// What runs a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub(crate) enum DeviceConfig {
    /// The processor.
    Cpu,
    /// A CUDA device.
    Cuda {
        /// As the driver counts.
        ordinal: usize,
    },
}

/// Where weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum LoadFormat {
    /// The checkpoint's safetensors files.
    Auto,
    /// Random weights of the checkpoint's shapes; no file but config.json is read.
    Random,
}

/// Element type of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum KvDtype {
    /// As the weights: float32 for a float32 checkpoint, bfloat16 otherwise.
    Auto,
    /// 4 bytes an element.
    Float32,
    /// 2 bytes an element.
    Bfloat16,
}

/// A fault of one rank, as the command line gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PlantedArg {
    /// Whose.
    pub(crate) rank: u32,
    /// The step that it begins with.
    pub(crate) step: u64,
    /// What goes wrong.
    pub(crate) kind: PlantedKind,
    /// For how long, where it is for a while.
    pub(crate) millis: u64,
}

/// Kinds of planted faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum PlantedKind {
    /// A digest of something else.
    Digest,
    /// Another token.
    Token,
    /// Nothing said.
    Mute,
    /// Nothing heard.
    Deaf,
}

impl PlantedArg {
    /// As the worker takes it.
    pub(crate) const fn planted(self) -> Planted {
        let pause = Duration::from_millis(self.millis);
        let fault = match self.kind {
            PlantedKind::Digest => PlantedFault::Digest,
            PlantedKind::Token => PlantedFault::Token,
            PlantedKind::Mute => PlantedFault::Mute(pause),
            PlantedKind::Deaf => PlantedFault::Deaf(pause),
        };
        Planted { step: StepSeq(self.step), fault }
    }
}

impl std::str::FromStr for PlantedArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORM: &str = "RANK,STEP,digest|token or RANK,STEP,mute|deaf,MILLISECONDS";
        let bad = || format!("{text} is not {FORM}");
        let parts: Vec<&str> = text.split(',').collect();
        let number = |text: &str| text.parse::<u64>().map_err(|_| bad());
        let (rank, step, kind, millis) = match parts.as_slice() {
            [rank, step, "digest"] => (rank, step, PlantedKind::Digest, 0),
            [rank, step, "token"] => (rank, step, PlantedKind::Token, 0),
            [rank, step, "mute", millis] => (rank, step, PlantedKind::Mute, number(millis)?),
            [rank, step, "deaf", millis] => (rank, step, PlantedKind::Deaf, number(millis)?),
            _ => return Err(bad()),
        };
        let rank = u32::try_from(number(rank)?).map_err(|_| bad())?;
        Ok(Self { rank, step: number(step)?, kind, millis })
    }
}
