//! The catalogue as a table for people: what docs/reference/metrics.md holds.
//!
//! Made from the registry, so that a metric cannot be renamed or added without its page. It reads
//! no value. Invariant: every registered metric and every alias is one row.

use crate::Metrics;
use crate::metrics::aliases;
use prometheus::proto::{MetricFamily, MetricType};
use std::fmt::Write;

impl Metrics {
    /// Two Markdown tables: the metrics with type, labels and meaning, and vLLM's names for them.
    #[must_use]
    pub fn reference(&self) -> String {
        let mut text =
            "| metric | type | labels | meaning |\n| --- | --- | --- | --- |\n".to_owned();
        for family in self.families() {
            let (name, kind, help) = (family.name(), kind(&family), family.help());
            let _ = writeln!(text, "| `{name}` | {kind} | {} | {help} |", labels(&family));
        }
        text.push_str("\n| vLLM's name | metric |\n| --- | --- |\n");
        for (ours, theirs) in aliases() {
            let _ = writeln!(text, "| `{theirs}` | `{ours}` |");
        }
        text
    }
}

fn kind(family: &MetricFamily) -> &'static str {
    match family.get_field_type() {
        MetricType::COUNTER => "counter",
        MetricType::GAUGE => "gauge",
        MetricType::HISTOGRAM => "histogram",
        MetricType::SUMMARY => "summary",
        MetricType::UNTYPED => "untyped",
    }
}

/// Names of labels, with their values where those are a closed set.
fn labels(family: &MetricFamily) -> String {
    let mut names: Vec<&str> = Vec::new();
    for label in family.get_metric().iter().flat_map(|metric| metric.get_label()) {
        if !names.contains(&label.name()) {
            names.push(label.name());
        }
    }
    let open = |name: &str| matches!(name, "model_name" | "version" | "backend" | "device" | "tokens");
    let cells: Vec<String> = names
        .iter()
        .map(|name| {
            if open(name) {
                return format!("`{name}`");
            }
            let mut values: Vec<&str> = Vec::new();
            for label in family.get_metric().iter().flat_map(|metric| metric.get_label()) {
                if label.name() == *name && !values.contains(&label.value()) {
                    values.push(label.value());
                }
            }
            format!("`{name}`: {}", values.join(", "))
        })
        .collect();
    cells.join("; ")
}
