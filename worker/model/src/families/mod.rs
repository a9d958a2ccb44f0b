//! One file per family, each reading like the paper it implements, over shared layers.
//!
//! Families choose modules and names; they never see a mesh.

mod deepseek;
mod layers;
mod llama;
mod qwen3;
mod qwen3_moe;

use crate::config::ModelConfig;
use crate::program::Program;

/// The program of a model. With `expert_parallel`, experts are owned whole by ranks of `ep`.
#[must_use]
pub fn program(config: &ModelConfig, expert_parallel: bool) -> Program {
    match config {
        ModelConfig::Llama(config) => llama::program(config, expert_parallel),
        ModelConfig::Qwen3(config) => qwen3::program(config, expert_parallel),
        ModelConfig::Qwen3Moe(config) => qwen3_moe::program(config, expert_parallel),
        ModelConfig::DeepSeek(config) => deepseek::program(config, expert_parallel),
    }
}
