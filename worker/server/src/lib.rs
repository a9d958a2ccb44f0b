//! The worker process: one session with a scheduler around one engine on a plain thread.
//!
//! It decides nothing; it loads, says hello, and executes commands in stream order. Invariants:
//! a command out of order ends the process with a fault that says why, and the process never
//! outlives the control plane that started it.

mod fake;
mod planted;
mod session;

pub use fake::{Fake, FakeCost};
pub use planted::{Planted, PlantedFault};
pub use session::{Role, Stepper, WorkerFault, panic_text, serve};

use std::io::Read;
use tokio::signal::unix::{SignalKind, signal};

/// Leaves it to the control plane when to end, from now on: what tells a server to stop (a terminal, a service
/// manager) often tells all of its processes, and the server may have requests to finish. Called in a
/// runtime.
pub fn stop_with_parent() {
    for kind in [SignalKind::interrupt(), SignalKind::terminate()] {
        // Whoever listens takes a signal's default away for good.
        if let Err(error) = signal(kind) {
            tracing::warn!(%error, "cannot leave signals to the control plane");
        }
    }
}

/// Exits the process when standard input ends: the control plane holds the other end, so this
/// fires however it died, also while the engine is busy.
pub fn exit_with_parent() {
    let watch = || {
        let mut sink = [0_u8; 64];
        let mut input = std::io::stdin().lock();
        while matches!(input.read(&mut sink), Ok(n) if n > 0) {}
        tracing::info!("the control plane is gone");
        std::process::exit(0);
    };
    if let Err(error) = std::thread::Builder::new().name("parent-watch".into()).spawn(watch) {
        tracing::warn!(%error, "cannot watch the control plane; the stream's end still ends this");
    }
}
