//! Llama 3.x: grouped-query attention, gated MLP, rotary embedding with the `llama3` scaling.

use super::fields::Fields;
use super::{ConfigError, Decoder, Gqa, common};

/// A Llama.
#[derive(Clone, Debug, PartialEq)]
pub struct Llama {
    /// Common fields.
    pub decoder: Decoder,
    /// Attention of every layer.
    pub attention: Gqa,
    /// `intermediate_size`.
    pub intermediate: usize,
    /// `mlp_bias`: the three projections of the MLP have biases.
    pub mlp_bias: bool,
}

pub(super) fn read(fields: &mut Fields<'_>) -> Result<Llama, ConfigError> {
    let decoder = common::read(fields)?;
    let attention = common::read_gqa(fields, &decoder, None)?;
    Ok(Llama {
        attention,
        intermediate: fields.size("intermediate_size")?,
        mlp_bias: fields.bool_or("mlp_bias", false)?,
        decoder,
    })
}
