//! `bench plot`: recorded sweeps as curves, one for each label.
//!
//! It measures nothing. Invariant: lines of another kind are refused, with file and line.

use crate::cli::PlotArgs;
use crate::out::say;
use anyhow::{Context, Result};
use load::{Curve, Point, draw};
use serde::Deserialize;
use std::fs;

/// What a plot needs of a recorded line.
#[derive(Debug, Deserialize)]
struct Line {
    label: String,
    model: String,
    input_len: u32,
    output_len: u32,
    concurrency: u32,
    gpus: u32,
    report: Figures,
}

#[derive(Debug, Deserialize)]
struct Figures {
    output_tokens_per_s: f64,
    tpot_ms: Mean,
}

#[derive(Debug, Deserialize)]
struct Mean {
    mean: f64,
}

/// Curves in the order of their first lines.
fn curves(lines: &[Line]) -> Vec<Curve> {
    let mut curves: Vec<Curve> = Vec::new();
    for line in lines {
        let point = Point {
            concurrency: line.concurrency,
            per_user: 1e3 / line.report.tpot_ms.mean,
            per_gpu: line.report.output_tokens_per_s / f64::from(line.gpus),
        };
        match curves.iter_mut().find(|curve| curve.label == line.label) {
            Some(curve) => curve.points.push(point),
            None => curves.push(Curve { label: line.label.clone(), points: vec![point] }),
        }
    }
    curves
}

/// Reads, draws, writes.
pub(super) fn run(args: &PlotArgs) -> Result<()> {
    let mut lines = Vec::new();
    for path in &args.files {
        let name = path.display();
        let text = fs::read_to_string(path).with_context(|| format!("read {name}"))?;
        for (number, text) in (1..).zip(text.lines()).filter(|(_, text)| !text.trim().is_empty()) {
            let line: Line = serde_json::from_str(text).with_context(|| {
                format!("{name}:{number} is not a line that `bench serve --record` writes")
            })?;
            lines.push(line);
        }
    }
    let title = args.title.clone().or_else(|| {
        let Line { model, input_len, output_len, .. } = lines.first()?;
        Some(format!("{model}, {input_len} tokens in, {output_len} out, by requests in flight"))
    });
    let svg = draw(&title.unwrap_or_default(), &curves(&lines))?;
    let out = args.out.display();
    fs::write(&args.out, svg).with_context(|| format!("write {out}"))?;
    say!("{} loads drawn to {out}", lines.len())?;
    Ok(())
}
