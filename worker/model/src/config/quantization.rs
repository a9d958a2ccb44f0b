//! `quantization_config`: how stored weights become numbers. Only FP8 in blocks is read; the
//! dequantising itself belongs to whoever opens the checkpoint.

use super::ConfigError;
use super::fields::Fields;
use serde_json::json;

/// FP8 (e4m3) weights with one scale per block, as DeepSeek publishes them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fp8Blocks {
    /// Rows and columns that share a scale (`weight_block_size`).
    pub block: (usize, usize),
    /// Modules kept in their own type (`modules_to_not_convert`).
    pub skipped: Vec<String>,
}

/// Reads the quantisation, absent in most files.
pub(super) fn read(fields: &mut Fields<'_>) -> Result<Option<Fp8Blocks>, ConfigError> {
    let Some(map) = fields.object("quantization_config")? else { return Ok(None) };
    let mut inner = Fields::new("quantization_config", map);
    match inner.text("quant_method")? {
        Some("fp8") => {}
        _ => return Err(inner.refuse("quant_method", "fp8 with weight_block_size")),
    }
    inner.only("fmt", &json!("e4m3"))?;
    // Weights are dequantised at load, so how activations would be scaled has no bearing.
    inner.ignore(&["activation_scheme", "scale_fmt", "dequantize"]);
    let sizes = inner.value("weight_block_size").and_then(|v| v.as_array()).cloned();
    let sizes: Option<Vec<u64>> = sizes.map(|s| s.iter().filter_map(|v| v.as_u64()).collect());
    let block = match sizes.as_deref() {
        Some(&[rows, cols]) if (1..=4096).contains(&rows) && (1..=4096).contains(&cols) => {
            (rows as usize, cols as usize)
        }
        _ => return Err(inner.refuse("weight_block_size", "two sizes from 1 to 4096")),
    };
    let skipped = inner.value("modules_to_not_convert").and_then(|v| v.as_array());
    let skipped = skipped
        .map(|list| list.iter().filter_map(|v| v.as_str().map(str::to_owned)).collect())
        .unwrap_or_default();
    if let Some(unknown) = inner.unread().into_iter().next() {
        // An unknown field of a quantisation decides what the numbers are.
        return Err(ConfigError::Unsupported {
            field: unknown.field,
            value: unknown.value,
            supported: "FP8 blocks without it".into(),
        });
    }
    Ok(Some(Fp8Blocks { block, skipped }))
}
