//! DeepSeek V2 and V3: multi-head latent attention, leading dense layers, shared and routed experts.
//!
//! The versions differ in how experts are scored and chosen and in one field for the rotary layout;
//! everything else is one shape. `kimi_k2` files are V3 under another name.

use super::fields::Fields;
use super::{ConfigError, Decoder, RopeConfig, common, rope};
use serde_json::json;

/// Which of the two routers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeepSeekVersion {
    /// Softmax scores; greedy or group-limited by the best expert of a group.
    V2,
    /// Sigmoid scores with a correction bias; groups limited by their best two experts.
    V3,
}

/// A DeepSeek.
#[derive(Clone, Debug, PartialEq)]
pub struct DeepSeek {
    /// Common fields.
    pub decoder: Decoder,
    /// Which router.
    pub version: DeepSeekVersion,
    /// Attention of every layer.
    pub attention: Mla,
    /// `intermediate_size`, of dense layers.
    pub intermediate: usize,
    /// `first_k_dense_replace`: leading layers without experts.
    pub dense_layers: usize,
    /// `n_routed_experts`.
    pub experts: usize,
    /// `n_shared_experts`, fused into one MLP; 0 for none.
    pub shared_experts: usize,
    /// `num_experts_per_tok`.
    pub top_k: usize,
    /// `moe_intermediate_size`.
    pub moe_intermediate: usize,
    /// (`n_group`, `topk_group`) where choice is limited to groups.
    pub groups: Option<(usize, usize)>,
    /// `norm_topk_prob`: weights of the chosen experts are made to sum to one.
    pub norm_topk: bool,
    /// `routed_scaling_factor`.
    pub routed_scale: f64,
}

/// Multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1).
#[derive(Clone, Debug, PartialEq)]
pub struct Mla {
    /// `num_attention_heads`.
    pub heads: usize,
    /// `q_lora_rank`; `None` projects queries directly.
    pub q_lora: Option<usize>,
    /// `kv_lora_rank`: width of the cached latent.
    pub latent: usize,
    /// `qk_nope_head_dim`.
    pub nope: usize,
    /// `qk_rope_head_dim`.
    pub rope_dim: usize,
    /// `v_head_dim`.
    pub v: usize,
    /// Rotary embedding of the `rope_dim` part.
    pub rope: RopeConfig,
    /// `attention_bias`: the latent and output projections have biases.
    pub bias: bool,
}

pub(super) fn read(
    fields: &mut Fields<'_>,
    version: DeepSeekVersion,
) -> Result<DeepSeek, ConfigError> {
    let decoder = common::read(fields)?;
    let defaults = Defaults::of(version);
    let attention = read_mla(fields, &decoder, version)?;
    fields.only("mlp_bias", &json!(false))?;
    fields.only("moe_layer_freq", &json!(1))?;
    // Multi-token prediction layers follow the model's own and are not part of a plain forward.
    fields.ignore(&["num_nextn_predict_layers", "num_mtp_layers"]);
    let experts = fields
        .opt_experts("n_routed_experts")?
        .ok_or_else(|| ConfigError::Missing { field: "n_routed_experts".into() })?;
    let top_k = fields.size("num_experts_per_tok")?;
    let (groups, norm_topk) = read_router(fields, version, experts)?;
    let eligible = groups.map_or(experts, |(n, chosen)| experts / n * chosen);
    if top_k > eligible {
        return Err(fields.refuse(
            "num_experts_per_tok",
            &format!("at most {eligible}, the experts that may be chosen"),
        ));
    }
    let moe_intermediate = fields.size("moe_intermediate_size")?;
    // Absent means the family's default, null means none.
    let default_shared = if fields.has("n_shared_experts") { 0 } else { defaults.shared_experts };
    let shared_experts = fields.count_or("n_shared_experts", default_shared)?;
    common::width("n_shared_experts x moe_intermediate_size", shared_experts, moe_intermediate)?;
    Ok(DeepSeek {
        version,
        attention,
        intermediate: fields.size("intermediate_size")?,
        dense_layers: fields
            .count_or("first_k_dense_replace", defaults.dense_layers)?
            .min(decoder.layers),
        experts,
        shared_experts,
        top_k,
        moe_intermediate,
        groups,
        norm_topk,
        routed_scale: fields.positive_or("routed_scaling_factor", defaults.routed_scale)?,
        decoder,
    })
}

/// What a file of the family means by leaving a field out.
struct Defaults {
    shared_experts: usize,
    dense_layers: usize,
    routed_scale: f64,
    groups: (usize, usize),
}

impl Defaults {
    const fn of(version: DeepSeekVersion) -> Self {
        match version {
            DeepSeekVersion::V2 => {
                Self { shared_experts: 2, dense_layers: 0, routed_scale: 1.0, groups: (1, 1) }
            }
            DeepSeekVersion::V3 => {
                Self { shared_experts: 1, dense_layers: 3, routed_scale: 2.5, groups: (8, 4) }
            }
        }
    }
}

fn read_mla(
    fields: &mut Fields<'_>,
    decoder: &Decoder,
    version: DeepSeekVersion,
) -> Result<Mla, ConfigError> {
    let heads = fields.size("num_attention_heads")?;
    // Latents are shared by all heads; the field only repeats the head count.
    if fields.opt_size("num_key_value_heads")?.is_some_and(|kv_heads| kv_heads != heads) {
        return Err(fields.refuse("num_key_value_heads", &format!("{heads}, as many as heads")));
    }
    let rope_dim = fields.size("qk_rope_head_dim")?;
    // Written by the library from the two above; it carries nothing of its own.
    fields.ignore(&["head_dim", "qk_head_dim"]);
    if !fields.has("q_lora_rank") {
        // Absent and null mean different models to different readers of these files.
        return Err(ConfigError::Missing { field: "q_lora_rank (a size, or null)".into() });
    }
    let nope = fields.size("qk_nope_head_dim")?;
    let v = fields.size("v_head_dim")?;
    let latent = fields.size("kv_lora_rank")?;
    common::width("num_attention_heads x query head width", heads, nope + rope_dim)?;
    common::width("num_attention_heads x (nope + v)", heads, nope + v)?;
    let mut rope = rope::read(fields, rope_dim, decoder.max_context)?;
    rope.interleaved = match version {
        DeepSeekVersion::V2 => true,
        DeepSeekVersion::V3 => fields.bool_or("rope_interleave", true)?,
    };
    Ok(Mla {
        heads,
        q_lora: fields.opt_size("q_lora_rank")?,
        latent,
        nope,
        rope_dim,
        v,
        rope,
        bias: fields.bool_or("attention_bias", false)?,
    })
}

/// Groups that limit the choice, and whether chosen weights are normalised.
fn read_router(
    fields: &mut Fields<'_>,
    version: DeepSeekVersion,
    experts: usize,
) -> Result<(Option<(usize, usize)>, bool), ConfigError> {
    let method = fields.text("topk_method")?;
    let scoring = fields.text("scoring_func")?;
    let n_group = fields.opt_size("n_group")?;
    let topk_group = fields.opt_size("topk_group")?;
    let (grouped, norm_topk) = match version {
        DeepSeekVersion::V2 => {
            if scoring.is_some_and(|scoring| scoring != "softmax") {
                return Err(fields.refuse("scoring_func", "softmax"));
            }
            // Published code divides by the sum, the library ignores the field: no right answer.
            fields.only("norm_topk_prob", &json!(false))?;
            match method {
                None | Some("greedy") => (false, false),
                Some("group_limited_greedy") => (true, false),
                Some(_) => {
                    return Err(fields.refuse("topk_method", "greedy or group_limited_greedy"));
                }
            }
        }
        DeepSeekVersion::V3 => {
            if scoring.is_some_and(|scoring| scoring != "sigmoid") {
                return Err(fields.refuse("scoring_func", "sigmoid"));
            }
            if method.is_some_and(|method| method != "noaux_tc") {
                return Err(fields.refuse("topk_method", "noaux_tc"));
            }
            (true, fields.bool_or("norm_topk_prob", true)?)
        }
    };
    if !grouped {
        return Ok((None, norm_topk));
    }
    let defaults = Defaults::of(version).groups;
    let (n, chosen) = (n_group.unwrap_or(defaults.0), topk_group.unwrap_or(defaults.1));
    if !experts.is_multiple_of(n) {
        return Err(fields.refuse("n_group", &format!("a divisor of {experts} experts")));
    }
    if chosen > n {
        return Err(fields.refuse("topk_group", &format!("at most n_group = {n}")));
    }
    if version == DeepSeekVersion::V3 && n > 1 && experts / n < 2 {
        return Err(fields.refuse("n_group", "groups of at least two experts"));
    }
    // One group limits nothing.
    Ok(((n > 1).then_some((n, chosen)), norm_topk))
}
