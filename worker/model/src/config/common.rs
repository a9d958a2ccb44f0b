//! What every decoder-only family shares, and grouped-query attention.
//!
//! It reads; what a family does with the values is in the programs.

use super::fields::{Fields, MAX_CONTEXT, MAX_SIZE};
use super::{ConfigError, Fp8Blocks, RopeConfig, quantization, rope};
use serde_json::json;

/// Storage type of the weights as the file declares it (tensors carry their own).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
}

/// Fields common to all families.
#[derive(Clone, Debug, PartialEq)]
pub struct Decoder {
    /// First entry of `architectures`, for people.
    pub architecture: String,
    /// `vocab_size`.
    pub vocab: usize,
    /// `hidden_size`.
    pub hidden: usize,
    /// `num_hidden_layers`.
    pub layers: usize,
    /// `rms_norm_eps`.
    pub norm_eps: f64,
    /// `tie_word_embeddings`: the head is the embedding table.
    pub tied: bool,
    /// `max_position_embeddings`, in tokens.
    pub max_context: usize,
    /// `dtype` or `torch_dtype`.
    pub dtype: Option<Dtype>,
    /// `eos_token_id`, one or several.
    pub eos: Vec<u32>,
    /// `quantization_config`, when the weights are stored in FP8 blocks.
    pub quantization: Option<Fp8Blocks>,
}

/// Grouped-query attention.
#[derive(Clone, Debug, PartialEq)]
pub struct Gqa {
    /// `num_attention_heads`.
    pub heads: usize,
    /// `num_key_value_heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rotary embedding over the whole head.
    pub rope: RopeConfig,
    /// `attention_bias`: query, key, value and output projections have biases.
    pub bias: bool,
}

/// Fields of training, generation and bookkeeping: understood, no bearing on a forward pass.
const NEUTRAL: [&str; 22] = [
    "_name_or_path",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "id2label",
    "initializer_range",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "sep_token_id",
    "transformers_version",
    "use_cache",
    "aux_loss_alpha",
    "seq_aux",
    "ep_size",
];

/// Reads the common fields.
pub(super) fn read(fields: &mut Fields<'_>) -> Result<Decoder, ConfigError> {
    fields.ignore(&NEUTRAL);
    fields.only("hidden_act", &json!("silu"))?;
    fields.only("is_encoder_decoder", &json!(false))?;
    let architecture = match fields.value("architectures") {
        None => String::new(),
        Some(list) => match list.get(0).and_then(|first| first.as_str()) {
            Some(first) => first.to_owned(),
            None => return Err(fields.refuse("architectures", "a list of names")),
        },
    };
    let max_context = fields.opt_number("max_position_embeddings", 1, MAX_CONTEXT)?;
    Ok(Decoder {
        architecture,
        vocab: fields.size("vocab_size")?,
        hidden: fields.size("hidden_size")?,
        layers: fields.size("num_hidden_layers")?,
        norm_eps: fields.positive_or("rms_norm_eps", 1e-6)?,
        tied: fields.bool_or("tie_word_embeddings", false)?,
        max_context: max_context
            .ok_or_else(|| ConfigError::Missing { field: "max_position_embeddings".into() })?
            as usize,
        dtype: dtype(fields)?,
        eos: eos(fields)?,
        quantization: quantization::read(fields)?,
    })
}

/// Reads grouped-query attention; `default_head_dim` of `None` means hidden / heads.
pub(super) fn read_gqa(
    fields: &mut Fields<'_>,
    decoder: &Decoder,
    default_head_dim: Option<usize>,
) -> Result<Gqa, ConfigError> {
    let heads = fields.size("num_attention_heads")?;
    let kv_heads = fields.size_or("num_key_value_heads", heads)?;
    if !heads.is_multiple_of(kv_heads) {
        return Err(ConfigError::Inconsistent {
            message: format!(
                "num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}"
            ),
        });
    }
    let head_dim = match (fields.opt_size("head_dim")?, default_head_dim) {
        (Some(head_dim), _) | (None, Some(head_dim)) => head_dim,
        (None, None) if decoder.hidden.is_multiple_of(heads) => decoder.hidden / heads,
        (None, None) => {
            return Err(ConfigError::Inconsistent {
                message: format!(
                    "hidden_size = {} is not a multiple of num_attention_heads = {heads}, \
                     and head_dim is absent",
                    decoder.hidden
                ),
            });
        }
    };
    width("num_attention_heads x head_dim", heads, head_dim)?;
    let rope = rope::read(fields, head_dim, decoder.max_context)?;
    Ok(Gqa { heads, kv_heads, head_dim, rope, bias: fields.bool_or("attention_bias", false)? })
}

/// `count * each`, refused where it is beyond any real width.
pub(super) fn width(what: &str, count: usize, each: usize) -> Result<usize, ConfigError> {
    match (count as u64).checked_mul(each as u64) {
        Some(width) if width <= MAX_SIZE => Ok(width as usize),
        _ => Err(ConfigError::Inconsistent {
            message: format!("{what} = {count} x {each} is wider than {MAX_SIZE}"),
        }),
    }
}

fn dtype(fields: &mut Fields<'_>) -> Result<Option<Dtype>, ConfigError> {
    let old = fields.text("torch_dtype")?;
    let (field, name) = match fields.text("dtype")? {
        Some(name) => ("dtype", Some(name)),
        None => ("torch_dtype", old),
    };
    match name {
        None => Ok(None),
        Some("float32") => Ok(Some(Dtype::F32)),
        Some("bfloat16") => Ok(Some(Dtype::Bf16)),
        Some("float16") => Ok(Some(Dtype::F16)),
        Some(_) => Err(fields.refuse(field, "float32, bfloat16 or float16")),
    }
}

fn eos(fields: &mut Fields<'_>) -> Result<Vec<u32>, ConfigError> {
    let Some(value) = fields.value("eos_token_id") else { return Ok(Vec::new()) };
    let one = |v: &serde_json::Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    let ids = match value.as_array() {
        Some(list) => list.iter().map(one).collect(),
        None => one(value).map(|id| vec![id]),
    };
    ids.ok_or_else(|| fields.refuse("eos_token_id", "a token id or a list of them"))
}
