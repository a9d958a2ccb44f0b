//! `tokenmill doctor`: what this machine can run, and what is missing, in one page.
//!
//! It changes nothing and contacts no host. Invariant: a line that is not ok says what to do.

use crate::serve::device::is_absent;
use anyhow::{Result, bail};
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
#[expect(clippy::print_stdout, reason = "the report is the command's output")]
pub(crate) fn run() -> Result<()> {
    let checks = [
        ("version", Finding::Ok(crate::cli::VERSION.to_owned())),
        ("processor", processor()),
        ("memory", memory()),
        ("gpu", gpu()),
        ("temporary folder", writable(&std::env::temp_dir(), "set TMPDIR to a writable folder")),
        ("port 8000", port(8000)),
    ];
    let mut bad = 0;
    for (name, finding) in checks {
        let (mark, text) = match finding {
            Finding::Ok(text) => ("ok  ", text),
            Finding::Note(text) => ("note", text),
            Finding::Bad(text) => {
                bad += 1;
                ("BAD ", text)
            }
        };
        println!("{mark}  {name:<18}{text}");
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

fn gpu() -> Finding {
    let gib = |bytes: ids::Bytes| bytes.0 as f64 / (1_u64 << 30) as f64;
    match engine::cuda_device(0) {
        Ok(device) => {
            let (free, total) = (gib(device.free), gib(device.total));
            let (major, minor) = device.driver;
            Finding::Ok(format!(
                "{}, {free:.1} of {total:.1} GiB free, a driver for CUDA {major}.{minor}, kernels built",
                device.name
            ))
        }
        Err(error) if is_absent(&error) => {
            Finding::Note(format!("{error}. The CPU backend serves"))
        }
        Err(error) => Finding::Bad(format!("{error}; `serve --device cpu` serves without it")),
    }
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
