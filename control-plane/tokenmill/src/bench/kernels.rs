//! `bench kernels`: every kernel checked, then timed, one line each.
//!
//! Invariant: a figure that is recorded is of a kernel that was right in this run.

use super::Unavailable;
use crate::cli::{KernelsArgs, VERSION};
use crate::out::say;
use anyhow::{Context, Result, bail};
use kernel_bench::{Bench, Case, Failure, Figure, Profile, Rate, cases};
use serde_json::{Value, json};
use std::fs::File;
use std::io::Write;

/// Lists, or checks and measures.
pub(crate) fn run(args: &KernelsArgs) -> Result<()> {
    let wanted = |case: &Case| {
        args.filter.is_empty() || args.filter.iter().any(|part| case.name().contains(part))
    };
    let cases: Vec<Case> = cases().into_iter().filter(wanted).collect();
    if cases.is_empty() {
        bail!("no kernel's name contains {}; --list shows all", args.filter.join(" or "));
    }
    if args.list {
        return cases.iter().try_for_each(|case| say!("{}", case.name()));
    }
    if args.profile {
        return profile(&cases);
    }
    let mut record = match &args.record {
        Some(path) => {
            let file = File::options().create(true).append(true).open(path);
            Some(file.with_context(|| format!("open {} to append to it", path.display()))?)
        }
        None => None,
    };
    let mut bench = Bench::open().map_err(unopened)?;
    let told = Told::new(&bench, args);
    if !args.json {
        say!("{}", bench.products())?;
    }
    for (name, value, unit) in told.ceilings(&bench) {
        if args.json {
            say!("{}", told.line(&name, value, unit))?;
        } else {
            say!("{name:<46}{value:>10.2} {unit}")?;
        }
    }
    let mut wrong = 0;
    for case in &cases {
        let figure = match bench.run(case) {
            Ok(figure) => figure,
            Err(failure) => {
                wrong += 1;
                eprintln!("WRONG {}: {failure}", case.name());
                continue;
            }
        };
        let line = told.figure(&figure);
        if args.json {
            say!("{line}")?;
        } else {
            say!("{}", row(&figure))?;
        }
        if let Some(file) = &mut record {
            writeln!(file, "{line}").context("append to the record")?;
        }
    }
    if wrong > 0 {
        bail!("{wrong} of {} kernels failed", cases.len());
    }
    Ok(())
}

/// Why there is nothing to measure on.
fn unopened(failure: Failure) -> anyhow::Error {
    match failure.is_absent() {
        true => Unavailable(failure.to_string()).into(),
        false => anyhow::Error::new(failure).context("open the device"),
    }
}

/// Launches cases for a profiler, in their order.
fn profile(cases: &[Case]) -> Result<()> {
    let mut profile = Profile::open().map_err(unopened)?;
    for case in cases {
        let launches = profile.launch(case).with_context(|| case.name().to_owned())?;
        say!("{} {launches}", case.name())?;
    }
    Ok(())
}

/// A figure for people.
fn row(figure: &Figure) -> String {
    let Figure { name, micros, floor, rate, peer, .. } = figure;
    let rate = match rate {
        Rate::Bytes(rate) => format!("{:.2} TB/s", rate / 1e12),
        Rate::Flops(rate) => format!("{:.0} TFLOP/s", rate / 1e12),
    };
    let peer = peer.map_or(String::new(), |peer| format!("   another {peer:.1} us"));
    let share = |floor: f64| format!("{:>5.1} %", 100.0 * floor / micros);
    let share = floor.map_or_else(|| " cached".to_owned(), share);
    format!("{name:<46}{micros:>10.2} us {rate:>13} {share}{peer}")
}

/// What every line of a run has in common.
struct Told {
    commit: &'static str,
    machine: String,
    command: String,
}

impl Told {
    fn new(bench: &Bench, args: &KernelsArgs) -> Self {
        let device = bench.device();
        let (major, minor) = device.driver;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let mut command = "tokenmill bench kernels".to_owned();
        if !args.filter.is_empty() {
            command += &format!(" --filter {}", args.filter.join(","));
        }
        Self {
            commit: env!("TOKENMILL_COMMIT"),
            machine: format!("one {}, {cores} cores, driver for CUDA {major}.{minor}", device.name),
            command,
        }
    }

    fn ceilings(&self, bench: &Bench) -> [(String, f64, &'static str); 3] {
        let of = bench.ceilings();
        [("copy", of.copy, "TB/s"), ("read", of.read, "TB/s"), ("product", of.product, "TFLOP/s")]
            .map(|(name, value, unit)| (format!("ceiling.{name}"), value / 1e12, unit))
    }

    fn line(&self, name: &str, value: f64, unit: &str) -> Value {
        let Self { commit, machine, command } = self;
        json!({
            "name": name, "value": rounded(value), "unit": unit, "floor": null, "peer": null,
            "commit": commit, "machine": machine, "command": command, "version": VERSION,
        })
    }

    fn figure(&self, figure: &Figure) -> Value {
        let Figure { name, micros, range, floor, rate, peer } = figure;
        let mut line = self.line(&format!("kernel.{name}.us"), *micros, "us");
        line["floor"] = json!(floor.map(rounded));
        line["peer"] = json!(peer);
        line["range"] = json!(range.map(rounded));
        line["percent"] = json!(floor.map(|floor| (1000.0 * floor / micros).round() / 10.0));
        match rate {
            Rate::Bytes(rate) => line["tb_per_s"] = json!(rounded(rate / 1e12)),
            Rate::Flops(rate) => line["tflop_per_s"] = json!(rounded(rate / 1e12)),
        }
        line
    }
}

/// To a thousandth.
fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_what_results_have() {
        let figure = Figure {
            name: "norm.rows1".into(),
            micros: 4.0,
            range: [3.9, 4.1],
            floor: Some(1.0),
            rate: Rate::Bytes(2.5e12),
            peer: None,
        };
        let told = Told { commit: "c", machine: "m".into(), command: "tokenmill".into() };
        let line = told.figure(&figure);
        for field in ["name", "value", "unit", "floor", "peer", "commit", "machine", "command"] {
            assert!(line.get(field).is_some(), "{field} in {line}");
        }
        assert_eq!(line["name"], "kernel.norm.rows1.us");
        assert_eq!(line["percent"], 25.0);
        assert!(row(&figure).contains("2.50 TB/s"));
    }
}
