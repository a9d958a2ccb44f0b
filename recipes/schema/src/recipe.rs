//! The fields of a recipe. Every one is read by `serve`, `recipe plan` or `recipe check`, and is
//! described in docs/reference/recipe.md.

use serde::Deserialize;

/// One deployment shape.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// One line for `recipe list`.
    pub summary: String,
    /// Which model.
    pub model: Model,
    /// What it runs on.
    pub hardware: Hardware,
    /// How many ranks, in which roles.
    #[serde(default)]
    pub mesh: Mesh,
    /// What is admitted.
    pub limits: Limits,
    /// The KV cache.
    #[serde(default)]
    pub cache: Cache,
    /// What was measured with this recipe.
    #[serde(default)]
    pub expect: Expect,
}

/// Which model.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// `bundled`, a folder, or ORG/NAME on the hub.
    pub source: String,
    /// Branch, tag or commit on the hub.
    #[serde(default = "main_branch")]
    pub revision: String,
}

/// What it runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hardware {
    /// Backend.
    pub kind: HardwareKind,
    /// Memory of one rank that may be used, in GiB.
    pub memory_gib: u32,
    /// Threads of one rank; all cores when absent.
    pub threads: Option<u16>,
}

/// Backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HardwareKind {
    /// The CPU backend.
    Cpu,
}

/// Ranks: `dp * tp` processes; with `ep`, experts are spread over all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Mesh {
    /// Data-parallel shards.
    pub dp: u16,
    /// Ranks that split each layer.
    pub tp: u16,
    /// Spread experts over all ranks.
    pub ep: bool,
}

/// What is admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Longest context in tokens.
    pub max_model_len: u32,
    /// Requests that run at once.
    pub max_num_seqs: u32,
    /// Tokens of one step.
    pub max_num_batched_tokens: u32,
}

/// The KV cache.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cache {
    /// `auto`, `float32` or `bfloat16`.
    pub dtype: CacheDtype,
    /// Bytes; what the memory plan leaves when absent.
    pub bytes: Option<u64>,
    /// Bytes of each rank's machine that keep blocks for which the cache has no room; 0 is none.
    pub host_bytes: u64,
    /// Reuse the KV of equal prefixes.
    pub prefix_caching: bool,
}

/// Element type of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheDtype {
    /// As the weights.
    #[default]
    Auto,
    /// 4 bytes.
    Float32,
    /// 2 bytes.
    Bfloat16,
}

/// What was measured with this recipe, for comparison by whoever runs it.
#[derive(Clone, Debug, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Expect {
    /// Machine the figures come from; required where a figure is given.
    pub machine: Option<String>,
    /// Seconds from the command to the first token.
    pub startup_s: Option<f64>,
    /// Tokens per second of one stream.
    pub decode_tokens_per_s: Option<f64>,
}

impl Default for Mesh {
    fn default() -> Self {
        Self { dp: 1, tp: 1, ep: false }
    }
}

impl Default for Cache {
    fn default() -> Self {
        Self { dtype: CacheDtype::Auto, bytes: None, host_bytes: 0, prefix_caching: true }
    }
}

fn main_branch() -> String {
    "main".to_owned()
}

/// One line of `recipe explain`.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Dotted name.
    pub name: &'static str,
    /// What it does and when to change it.
    pub about: &'static str,
}

/// Every field, in file order.
pub const FIELDS: [Field; 19] = [
    Field { name: "summary", about: "one line for `recipe list`" },
    Field { name: "model.source", about: "`bundled`, a folder, or ORG/NAME on the hub" },
    Field {
        name: "model.revision",
        about: "branch, tag or commit on the hub; every file comes from it",
    },
    Field { name: "hardware.kind", about: "backend: `cpu`" },
    Field {
        name: "hardware.memory_gib",
        about: "memory one rank may use; the plan must fit in it",
    },
    Field { name: "hardware.threads", about: "threads of one rank; all cores when absent" },
    Field { name: "mesh.dp", about: "data-parallel shards, each with its own requests" },
    Field { name: "mesh.tp", about: "ranks that split each layer; must divide the heads" },
    Field { name: "mesh.ep", about: "spread experts over all dp x tp ranks" },
    Field { name: "limits.max_model_len", about: "longest context; larger needs a larger cache" },
    Field {
        name: "limits.max_num_seqs",
        about: "requests that run at once; more raise throughput and the time of a step",
    },
    Field {
        name: "limits.max_num_batched_tokens",
        about: "tokens of one step; more speed up prompts and lengthen pauses between tokens",
    },
    Field { name: "cache.dtype", about: "element type of the KV cache; bfloat16 halves it" },
    Field { name: "cache.bytes", about: "size of the KV cache; what the plan leaves when absent" },
    Field {
        name: "cache.host_bytes",
        about: "memory of the machine for blocks that the cache has no room for; none when absent",
    },
    Field { name: "cache.prefix_caching", about: "reuse the KV of equal prefixes" },
    Field { name: "expect.machine", about: "machine the measured figures come from" },
    Field {
        name: "expect.startup_s",
        about: "measured seconds to the first token, on expect.machine",
    },
    Field {
        name: "expect.decode_tokens_per_s",
        about: "measured tokens per second of one stream, on expect.machine",
    },
];
