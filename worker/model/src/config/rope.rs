//! Rotary embedding: `rope_parameters` (transformers 5), or `rope_theta` with `rope_scaling`
//! (published files), and the frequencies they mean.
//!
//! Sources: RoFormer (2104.09864), YaRN (2309.00071), the Llama 3.1 release for `llama3`. It knows
//! no tensor layout beyond `interleaved`. Invariant: frequencies are finite and positive.

use super::ConfigError;
use super::fields::{Fields, MAX_CONTEXT};
use serde_json::{Map, Value, json};
use std::f64::consts::PI;

/// `rope_theta` where a file has none.
const DEFAULT_THETA: f64 = 10_000.0;

/// One rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Rotated width; even.
    pub dim: usize,
    /// `rope_theta`.
    pub theta: f64,
    /// How frequencies are stretched for long contexts.
    pub scaling: RopeScaling,
    /// Whether pairs are neighbours (`x0, x1`) or halves apart (`x0, x[dim/2]`).
    pub interleaved: bool,
}

/// `rope_type` with its parameters.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// `default`.
    None,
    /// `linear`: every frequency divided by the factor.
    Linear {
        /// `factor`.
        factor: f64,
    },
    /// `llama3`: low frequencies divided, high kept, a smooth step between.
    Llama3 {
        /// `factor`.
        factor: f64,
        /// `low_freq_factor`.
        low: f64,
        /// `high_freq_factor`.
        high: f64,
        /// `original_max_position_embeddings`.
        original: f64,
    },
    /// `yarn`.
    Yarn(Yarn),
}

/// Parameters of YaRN.
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    /// `factor`, or the ratio of the contexts where the file has none.
    pub factor: f64,
    /// `original_max_position_embeddings`.
    pub original: f64,
    /// `beta_fast`: rotations from which on a frequency is kept.
    pub beta_fast: f64,
    /// `beta_slow`: rotations below which a frequency is divided.
    pub beta_slow: f64,
    /// `mscale`.
    pub mscale: Option<f64>,
    /// `mscale_all_dim`.
    pub mscale_all_dim: Option<f64>,
    /// `attention_factor`, which overrides the one derived from the mscales.
    pub attention_factor: Option<f64>,
    /// `truncate`: the range of stretched dimensions ends on whole dimensions.
    pub truncate: bool,
}

impl RopeConfig {
    /// Radians per position of each rotated pair, `[dim / 2]`.
    #[must_use]
    pub fn inv_freq(&self) -> Vec<f32> {
        let dim = self.dim as f64;
        let base = (0..self.dim / 2).map(|i| self.theta.powf(-(2.0 * i as f64) / dim));
        match &self.scaling {
            RopeScaling::None => base.map(|f| f as f32).collect(),
            RopeScaling::Linear { factor } => base.map(|f| (f / factor) as f32).collect(),
            RopeScaling::Llama3 { factor, low, high, original } => base
                .map(|f| {
                    let rotations = original * f / (2.0 * PI);
                    let kept = ((rotations - low) / (high - low)).clamp(0.0, 1.0);
                    ((1.0 - kept) * f / factor + kept * f) as f32
                })
                .collect(),
            RopeScaling::Yarn(yarn) => {
                let (first, last) = yarn.stretched(dim, self.theta);
                base.enumerate()
                    .map(|(i, f)| {
                        let divided = ((i as f64 - first) / (last - first)).clamp(0.0, 1.0);
                        (divided * f / yarn.factor + (1.0 - divided) * f) as f32
                    })
                    .collect()
            }
        }
    }

    /// What sine and cosine are multiplied by.
    #[must_use]
    pub fn attention_factor(&self) -> f32 {
        let RopeScaling::Yarn(yarn) = &self.scaling else { return 1.0 };
        let derived = match (yarn.mscale.filter(set), yarn.mscale_all_dim.filter(set)) {
            (Some(m), Some(all)) => mscale(yarn.factor, m) / mscale(yarn.factor, all),
            _ => mscale(yarn.factor, 1.0),
        };
        yarn.attention_factor.unwrap_or(derived) as f32
    }

    /// What DeepSeek multiplies the softmax scale by: `mscale(factor, mscale_all_dim)` squared.
    #[must_use]
    pub fn softmax_factor(&self) -> f64 {
        let RopeScaling::Yarn(yarn) = &self.scaling else { return 1.0 };
        yarn.mscale_all_dim.filter(set).map_or(1.0, |all| mscale(yarn.factor, all).powi(2))
    }
}

impl Yarn {
    /// First and last pair of the ramp from kept to divided frequencies.
    fn stretched(&self, dim: f64, theta: f64) -> (f64, f64) {
        let pair_with = |rotations: f64| {
            dim * (self.original / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln())
        };
        let (mut first, mut last) = (pair_with(self.beta_fast), pair_with(self.beta_slow));
        if self.truncate {
            (first, last) = (first.floor(), last.ceil());
        }
        (first, last) = (first.max(0.0), last.min(dim - 1.0));
        // An empty ramp would divide by zero.
        if first == last { (first, last + 0.001) } else { (first, last) }
    }
}

/// A zero in the file means "not set", as in the code that defines these fields.
fn set(value: &f64) -> bool {
    *value != 0.0
}

/// The attention temperature of YaRN, equation 22 with a strength.
fn mscale(factor: f64, strength: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * strength * factor.ln() + 1.0 }
}

/// Reads the embedding of width `dim`; pairs are halves apart unless the family says otherwise.
pub(super) fn read(
    fields: &mut Fields<'_>,
    dim: usize,
    max_context: usize,
) -> Result<RopeConfig, ConfigError> {
    if !dim.is_multiple_of(2) {
        return Err(ConfigError::Inconsistent {
            message: format!("a rotary embedding needs an even width, got {dim}"),
        });
    }
    fields.only("partial_rotary_factor", &json!(1.0))?;
    let outer_theta = fields.positive_or("rope_theta", DEFAULT_THETA)?;
    let old = fields.object("rope_scaling")?;
    let (name, map) = match fields.object("rope_parameters")? {
        Some(map) => ("rope_parameters", Some(map)),
        None => ("rope_scaling", old),
    };
    let Some(map) = map else {
        let scaling = RopeScaling::None;
        return Ok(RopeConfig { dim, theta: theta(outer_theta)?, scaling, interleaved: false });
    };
    let map = one_for_all_layers(fields, name, map)?;
    let mut inner = Fields::new(name, map);
    inner.only("partial_rotary_factor", &json!(1.0))?;
    let theta = theta(inner.positive_or("rope_theta", outer_theta)?)?;
    let scaling = read_scaling(&mut inner, max_context)?;
    if let Some(unknown) = inner.unread().into_iter().next() {
        // Every field of this object bends the frequencies.
        return Err(ConfigError::Unsupported {
            field: unknown.field,
            value: unknown.value,
            supported: "rope parameters without it".into(),
        });
    }
    Ok(RopeConfig { dim, theta, scaling, interleaved: false })
}

fn theta(theta: f64) -> Result<f64, ConfigError> {
    if theta > 1.0 {
        return Ok(theta);
    }
    Err(ConfigError::Inconsistent { message: format!("rope_theta = {theta} is not above 1") })
}

/// `rope_parameters` may hold one object per layer type; these families rotate all layers alike.
fn one_for_all_layers<'a>(
    fields: &Fields<'_>,
    name: &str,
    map: &'a Map<String, Value>,
) -> Result<&'a Map<String, Value>, ConfigError> {
    let mut layers = map.values().filter_map(Value::as_object);
    match layers.next() {
        None => Ok(map),
        Some(first) if layers.all(|other| other == first) => Ok(first),
        Some(_) => Err(fields.refuse(name, "the same parameters for every layer type")),
    }
}

fn read_scaling(inner: &mut Fields<'_>, max_context: usize) -> Result<RopeScaling, ConfigError> {
    let old = inner.text("type")?;
    let kind = inner.text("rope_type")?.or(old).unwrap_or("default");
    match kind {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: inner.positive("factor")? }),
        "llama3" => {
            let scaling = RopeScaling::Llama3 {
                factor: inner.positive("factor")?,
                low: inner.positive("low_freq_factor")?,
                high: inner.positive("high_freq_factor")?,
                original: original(inner, max_context)?,
            };
            if let RopeScaling::Llama3 { low, high, .. } = scaling
                && high <= low
            {
                return Err(inner.refuse("high_freq_factor", "more than low_freq_factor"));
            }
            Ok(scaling)
        }
        "yarn" => {
            let original = original(inner, max_context)?;
            let factor = inner.positive_or("factor", max_context as f64 / original)?;
            // Zero, like null, stands for the default here.
            let beta = |value: Option<f64>, default| value.filter(set).unwrap_or(default);
            Ok(RopeScaling::Yarn(Yarn {
                factor,
                original,
                beta_fast: beta(inner.opt_float("beta_fast")?, 32.0),
                beta_slow: beta(inner.opt_float("beta_slow")?, 1.0),
                mscale: inner.opt_float("mscale")?,
                mscale_all_dim: inner.opt_float("mscale_all_dim")?,
                attention_factor: inner.opt_float("attention_factor")?,
                truncate: inner.bool_or("truncate", true)?,
            }))
        }
        _ => {
            let field = if old.is_some() { "type" } else { "rope_type" };
            Err(inner.refuse(field, "default, linear, llama3 or yarn"))
        }
    }
}

fn original(inner: &mut Fields<'_>, max_context: usize) -> Result<f64, ConfigError> {
    let given = inner.opt_number("original_max_position_embeddings", 1, MAX_CONTEXT)?;
    Ok(given.map_or(max_context as f64, |n| n as f64))
}
