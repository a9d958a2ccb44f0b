//! `tokenmill doctor`: what this machine can run, and what is missing, in one page.
//!
//! It changes nothing and contacts no host. Invariant: a line that is not ok says what to do.

use crate::out::say;
use crate::serve::device::is_absent;
use anyhow::{Result, bail};
use engine::{GpuFigures, Nvml, Throttle};
use std::path::Path;

/// How a check came out.
enum Finding {
    Ok(String),
    /// Works, but something is worth knowing.
    Note(String),
    /// Serving cannot work; the text says what to do.
    Bad(String),
}

/// Prints every check; fails when one is bad.
pub(crate) fn run() -> Result<()> {
    let (gpu, state) = gpu();
    let checks = [
        ("version", Finding::Ok(crate::cli::VERSION.to_owned())),
        ("processor", processor()),
        ("memory", memory()),
        ("gpu", gpu),
        ("temporary folder", writable(&std::env::temp_dir(), "set TMPDIR to a writable folder")),
        ("port 8000", port(8000)),
    ];
    let mut bad = 0;
    let state = state.map(|state| ("gpu state", state));
    for (name, finding) in checks.into_iter().chain(state) {
        let (mark, text) = match finding {
            Finding::Ok(text) => ("ok  ", text),
            Finding::Note(text) => ("note", text),
            Finding::Bad(text) => {
                bad += 1;
                ("BAD ", text)
            }
        };
        say!("{mark}  {name:<18}{text}")?;
    }
    if bad > 0 {
        bail!("{bad} of the checks failed");
    }
    Ok(())
}

fn processor() -> Finding {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let isa = engine::cpu_isa();
    let text = format!("{cores} cores, kernels for {isa}");
    if isa == "scalar" {
        Finding::Note(format!("{text}; without AVX2 the CPU backend is slow"))
    } else {
        Finding::Ok(text)
    }
}

fn memory() -> Finding {
    match crate::serve::memory::available() {
        Some(bytes) => {
            Finding::Ok(format!("{:.1} GiB available", bytes as f64 / (1_u64 << 30) as f64))
        }
        None => Finding::Note("unknown; give --kv-cache-memory-bytes".into()),
    }
}

/// The device, and how it is doing where there is one.
fn gpu() -> (Finding, Option<Finding>) {
    let gib = |bytes: ids::Bytes| bytes.0 as f64 / (1_u64 << 30) as f64;
    match engine::cuda_device(0) {
        Ok(device) => {
            let (free, total) = (gib(device.free), gib(device.total));
            let (major, minor) = device.driver;
            let found = format!(
                "{}, {free:.1} of {total:.1} GiB free, a driver for CUDA {major}.{minor}, kernels built",
                device.name
            );
            let state = match Nvml::open(&device.pci) {
                Ok(nvml) => state(&nvml.figures()),
                Err(error) => {
                    Finding::Note(format!("{error}. Metrics are without the device's state"))
                }
            };
            (Finding::Ok(found), Some(state))
        }
        Err(error) if is_absent(&error) => {
            (Finding::Note(format!("{error}. The CPU backend serves")), None)
        }
        Err(error) => {
            (Finding::Bad(format!("{error}; `serve --device cpu` serves without it")), None)
        }
    }
}

/// What the management library says; worth a note where it slows down or has lost data.
fn state(figures: &GpuFigures) -> Finding {
    let gib = |bytes: u64| format!("{:.1}", bytes as f64 / (1_u64 << 30) as f64);
    let mhz = |hertz: u64| hertz / 1_000_000;
    let mut told = Vec::new();
    let memory = figures.memory_used.zip(figures.memory_total);
    told.extend(memory.map(|(used, total)| format!("{} of {} GiB used", gib(used), gib(total))));
    told.extend(figures.utilisation.map(|share| format!("{:.0} % busy", 100.0 * share)));
    told.extend(figures.power.map(|watts| format!("{watts:.0} W")));
    told.extend(figures.temperature.map(|celsius| format!("{celsius} C")));
    told.extend(figures.sm_clock.map(|hertz| format!("SM {} MHz", mhz(hertz))));
    told.extend(figures.memory_clock.map(|hertz| format!("memory {} MHz", mhz(hertz))));
    let errors = figures.ecc_uncorrected.unwrap_or(0);
    let throttled = figures.throttled.as_deref().unwrap_or_default();
    told.extend((errors > 0).then(|| format!("{errors} memory errors that were not corrected")));
    let named = |reason: &Throttle| match reason {
        Throttle::Power => "its power limit",
        Throttle::Thermal => "temperature",
        Throttle::Hardware => "a protection of the hardware",
    };
    told.extend(throttled.iter().map(|reason| format!("slowed down by {}", named(reason))));
    let text = told.join(", ");
    if errors > 0 || !throttled.is_empty() { Finding::Note(text) } else { Finding::Ok(text) }
}

fn writable(folder: &Path, advice: &str) -> Finding {
    match tempfile::tempfile_in(folder) {
        Ok(_) => Finding::Ok(folder.display().to_string()),
        Err(error) => Finding::Bad(format!("{}: {error}; {advice}", folder.display())),
    }
}

fn port(port: u16) -> Finding {
    match std::net::TcpListener::bind(("127.0.0.1", port)) {
        Ok(_) => Finding::Ok("free".into()),
        Err(error) => Finding::Note(format!("{error}; use `serve --port`")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_slows_down_is_worth_a_note() {
        let mut figures = GpuFigures { power: Some(699.6), ..GpuFigures::default() };
        assert!(matches!(state(&figures), Finding::Ok(text) if text == "700 W"));
        figures.throttled = Some(vec![Throttle::Power]);
        let Finding::Note(text) = state(&figures) else { panic!("a note") };
        assert_eq!(text, "700 W, slowed down by its power limit");
    }
}
