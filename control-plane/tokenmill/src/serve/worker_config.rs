//! What a worker process is told at its start. Internal: written by this binary, read by the same
//! binary, so unknown fields are refused.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

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
}

impl WorkerConfig {
    /// What the next life is told: faults are planted once.
    pub(crate) fn heal(&mut self) {
        if let EngineConfig::Model(model) = &mut self.engine {
            model.failing_launch = None;
        }
    }
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
