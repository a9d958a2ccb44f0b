//! `config.json` to one typed config per family, from both dialects that checkpoints come in:
//! published files (`rope_theta`, `rope_scaling`, `torch_dtype`) and transformers 5
//! (`rope_parameters`, `dtype`).
//!
//! A field is used, neutral (understood, no bearing on inference) or refused; a field nobody knows
//! is a warning. It opens no file and judges no hardware. Invariant: a parsed config describes a
//! model that the programs of this crate can express completely.

mod common;
mod deepseek;
mod fields;
mod llama;
mod quantization;
mod qwen3;
mod rope;

pub use common::{Decoder, Dtype, Gqa};
pub use deepseek::{DeepSeek, DeepSeekVersion, Mla};
pub use llama::Llama;
pub use quantization::Fp8Blocks;
pub use qwen3::{Qwen3, Qwen3Moe};
pub use rope::{RopeConfig, RopeScaling, Yarn};

use fields::Fields;
use serde_json::Value;

/// A model family with its parameters.
#[derive(Clone, Debug, PartialEq)]
pub enum ModelConfig {
    /// Llama 3.x and models of the same shape.
    Llama(Llama),
    /// Qwen3 dense.
    Qwen3(Qwen3),
    /// Qwen3 with experts.
    Qwen3Moe(Qwen3Moe),
    /// DeepSeek V2 and V3, and what shares their shape.
    DeepSeek(DeepSeek),
}

/// A parsed file and what in it was not understood.
#[derive(Clone, Debug, PartialEq)]
pub struct Parsed {
    /// The model.
    pub config: ModelConfig,
    /// Fields that no family of this crate knows; worth a line in the log.
    pub warnings: Vec<Warning>,
}

/// A field that is not known here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// Dotted name in the file.
    pub field: String,
    /// Its value as JSON.
    pub value: String,
}

impl core::fmt::Display for Warning {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "unknown field {} = {} has no effect", self.field, self.value)
    }
}

/// Why a `config.json` is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not JSON, or not an object.
    #[error("config.json is not a JSON object")]
    Syntax(#[source] Option<serde_json::Error>),
    /// A field without which the model is not determined.
    #[error("config.json lacks {field}, which this model type needs")]
    Missing {
        /// Dotted name.
        field: String,
    },
    /// A value that would change the result in a way that is not implemented.
    #[error("config.json: {field} = {value} is not supported; supported: {supported}")]
    Unsupported {
        /// Dotted name.
        field: String,
        /// The value as JSON.
        value: String,
        /// What would be accepted.
        supported: String,
    },
    /// Two fields that contradict each other.
    #[error("config.json: {message}")]
    Inconsistent {
        /// Which fields, with their values, and the rule they break.
        message: String,
    },
}

/// `model_type` values that [`parse`] accepts.
pub const MODEL_TYPES: [&str; 6] =
    ["llama", "qwen3", "qwen3_moe", "deepseek_v2", "deepseek_v3", "kimi_k2"];

/// Parses the text of a `config.json`.
///
/// # Errors
/// The first field that is missing, malformed or unsupported, by name.
pub fn parse(text: &str) -> Result<Parsed, ConfigError> {
    let value: Value = serde_json::from_str(text).map_err(|e| ConfigError::Syntax(Some(e)))?;
    let Value::Object(map) = value else { return Err(ConfigError::Syntax(None)) };
    let mut fields = Fields::new("", &map);
    let config = match fields.text("model_type")? {
        Some("llama") => ModelConfig::Llama(llama::read(&mut fields)?),
        Some("qwen3") => ModelConfig::Qwen3(qwen3::read_dense(&mut fields)?),
        Some("qwen3_moe") => ModelConfig::Qwen3Moe(qwen3::read_moe(&mut fields)?),
        Some("deepseek_v2") => {
            ModelConfig::DeepSeek(deepseek::read(&mut fields, DeepSeekVersion::V2)?)
        }
        Some("deepseek_v3" | "kimi_k2") => {
            ModelConfig::DeepSeek(deepseek::read(&mut fields, DeepSeekVersion::V3)?)
        }
        Some(_) => return Err(fields.refuse("model_type", &MODEL_TYPES.join(", "))),
        None => return Err(ConfigError::Missing { field: "model_type".into() }),
    };
    Ok(Parsed { config, warnings: fields.unread() })
}

impl ModelConfig {
    /// What every family has.
    #[must_use]
    pub const fn decoder(&self) -> &Decoder {
        match self {
            Self::Llama(config) => &config.decoder,
            Self::Qwen3(config) => &config.decoder,
            Self::Qwen3Moe(config) => &config.decoder,
            Self::DeepSeek(config) => &config.decoder,
        }
    }
}

#[cfg(test)]
mod tests;
