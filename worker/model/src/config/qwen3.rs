//! Qwen3 and Qwen3-MoE: grouped-query attention with normalised queries and keys; sliding windows
//! in the dense family; softmax-routed experts in the other.

use super::fields::Fields;
use super::{ConfigError, Decoder, Gqa, common};

/// Qwen3, dense.
#[derive(Clone, Debug, PartialEq)]
pub struct Qwen3 {
    /// Common fields.
    pub decoder: Decoder,
    /// Attention of every layer.
    pub attention: Gqa,
    /// `intermediate_size`.
    pub intermediate: usize,
    /// Per layer: tokens seen (itself included), or `None` for all of the past.
    pub windows: Vec<Option<usize>>,
}

/// Qwen3 with experts.
#[derive(Clone, Debug, PartialEq)]
pub struct Qwen3Moe {
    /// Common fields.
    pub decoder: Decoder,
    /// Attention of every layer.
    pub attention: Gqa,
    /// `intermediate_size`, of dense layers.
    pub intermediate: usize,
    /// `num_experts`.
    pub experts: usize,
    /// `num_experts_per_tok`.
    pub top_k: usize,
    /// `moe_intermediate_size`.
    pub moe_intermediate: usize,
    /// `norm_topk_prob`: weights of the chosen experts are made to sum to one.
    pub norm_topk: bool,
    /// Per layer: whether it has experts (`decoder_sparse_step`, `mlp_only_layers`).
    pub sparse: Vec<bool>,
}

/// `head_dim` of both families where the file has none.
const HEAD_DIM: usize = 128;

pub(super) fn read_dense(fields: &mut Fields<'_>) -> Result<Qwen3, ConfigError> {
    let decoder = common::read(fields)?;
    let attention = common::read_gqa(fields, &decoder, Some(HEAD_DIM))?;
    let intermediate = fields.size("intermediate_size")?;
    let windows = windows(fields, decoder.layers)?;
    Ok(Qwen3 { decoder, attention, intermediate, windows })
}

pub(super) fn read_moe(fields: &mut Fields<'_>) -> Result<Qwen3Moe, ConfigError> {
    let decoder = common::read(fields)?;
    // This family alone derives the head width in the published code; the files all give it.
    let attention = common::read_gqa(fields, &decoder, None)?;
    // The published model code applies no window in this family unless it is switched on.
    if fields.bool_or("use_sliding_window", false)? {
        return Err(fields.refuse("use_sliding_window", "false"));
    }
    fields.ignore(&["sliding_window", "max_window_layers"]);
    let step = fields.size_or("decoder_sparse_step", 1)?;
    let experts = match fields.opt_experts("num_experts")? {
        Some(experts) => experts,
        None => fields
            .opt_experts("num_local_experts")?
            .ok_or_else(|| ConfigError::Missing { field: "num_experts".into() })?,
    };
    let top_k = fields.size("num_experts_per_tok")?;
    if top_k > experts {
        return Err(fields.refuse("num_experts_per_tok", &format!("at most {experts} experts")));
    }
    let dense = layer_list(fields, "mlp_only_layers")?;
    let sparse = (0..decoder.layers)
        .map(|layer| !dense.contains(&layer) && (layer + 1).is_multiple_of(step))
        .collect();
    Ok(Qwen3Moe {
        attention,
        intermediate: fields.size("intermediate_size")?,
        experts,
        top_k,
        moe_intermediate: fields.size("moe_intermediate_size")?,
        norm_topk: fields.bool_or("norm_topk_prob", false)?,
        sparse,
        decoder,
    })
}

fn layer_list(fields: &mut Fields<'_>, field: &str) -> Result<Vec<usize>, ConfigError> {
    let Some(value) = fields.value(field) else { return Ok(Vec::new()) };
    let list = value.as_array().and_then(|list| {
        list.iter().map(|v| v.as_u64().and_then(|n| usize::try_from(n).ok())).collect()
    });
    list.ok_or_else(|| fields.refuse(field, "a list of layer numbers"))
}

/// `layer_types` where given; otherwise layers from `max_window_layers` on slide.
fn windows(fields: &mut Fields<'_>, layers: usize) -> Result<Vec<Option<usize>>, ConfigError> {
    let slides = fields.bool_or("use_sliding_window", false)?;
    let window = fields.opt_size("sliding_window")?.filter(|_| slides);
    let first = fields.count_or("max_window_layers", 28)?;
    let Some(types) = fields.value("layer_types") else {
        return Ok((0..layers).map(|layer| window.filter(|_| layer >= first)).collect());
    };
    let supported = format!("{layers} entries, each full_attention or sliding_attention");
    let Some(types) = types.as_array().filter(|types| types.len() == layers) else {
        return Err(fields.refuse("layer_types", &supported));
    };
    let mut windows = Vec::with_capacity(layers);
    for kind in types {
        windows.push(match kind.as_str() {
            Some("full_attention") => None,
            Some("sliding_attention") if window.is_some() => window,
            Some("sliding_attention") => {
                return Err(fields.refuse(
                    "sliding_window",
                    "a window and use_sliding_window = true, since layer_types names sliding layers",
                ));
            }
            _ => return Err(fields.refuse("layer_types", &supported)),
        });
    }
    Ok(windows)
}
