//! Progress on a terminal: bars for people, nothing where standard error is not a terminal.

use indicatif::{ProgressBar, ProgressStyle};

/// A bar over `total` things; draws on standard error, and only on a terminal.
pub(crate) fn bar(total: u64, unit: &str) -> ProgressBar {
    let bar = ProgressBar::new(total);
    if let Ok(style) = ProgressStyle::with_template(&format!(
        "{{msg}} {{wide_bar}} {{pos}}/{{len}} {unit} {{eta}}"
    )) {
        bar.set_style(style);
    }
    bar
}
