//! How long the start took, part by part: a line in the log and metrics.
//!
//! It measures nothing but totals; whoever does a part says what it took. Invariant: the line is
//! written once for every worker that becomes ready, and its parts are that worker's.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use step::StartPhase;
use telemetry::{Metrics, StartupPhase};

/// The start of one server.
pub(crate) struct Startup {
    /// When the command began.
    command: Instant,
    metrics: Arc<Metrics>,
    parts: Mutex<BTreeMap<StartupPhase, Duration>>,
    was_ready: AtomicBool,
    first_token: AtomicBool,
}

impl Startup {
    pub(crate) fn new(command: Instant, metrics: Arc<Metrics>) -> Self {
        Self {
            command,
            metrics,
            parts: Mutex::default(),
            was_ready: AtomicBool::new(false),
            first_token: AtomicBool::new(false),
        }
    }

    /// A part is over.
    pub(crate) fn took(&self, phase: StartupPhase, time: Duration) {
        self.metrics.startup(phase).set(time.as_secs_f64());
        self.parts.lock().unwrap_or_else(PoisonError::into_inner).insert(phase, time);
    }

    /// A part of the worker's start is over.
    pub(crate) fn worker_took(&self, phase: StartPhase, time: Duration) {
        let phase = match phase {
            StartPhase::Device => StartupPhase::Device,
            StartPhase::Kernels => StartupPhase::Kernels,
            StartPhase::Weights => StartupPhase::Weights,
            StartPhase::Memory => StartupPhase::Memory,
            StartPhase::Graphs => StartupPhase::Graphs,
        };
        self.took(phase, time);
    }

    /// A worker serves; the first one ends the start of the command.
    pub(crate) fn ready(&self) {
        let mut line = String::new();
        {
            let parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
            for (phase, time) in parts.iter().filter(|(phase, _)| **phase < StartupPhase::Ready) {
                let _ = write!(line, "{} {:.3} s, ", phase.as_str(), time.as_secs_f64());
            }
        }
        let parts = line.trim_end_matches(", ");
        if self.was_ready.swap(true, Ordering::Relaxed) {
            tracing::info!("a new worker serves: {parts}");
            return;
        }
        let all = self.command.elapsed();
        self.took(StartupPhase::Ready, all);
        tracing::info!("ready {:.3} s after the command: {parts}", all.as_secs_f64());
    }

    /// A token was drawn.
    pub(crate) fn token(&self) {
        if !self.first_token.swap(true, Ordering::Relaxed) {
            let all = self.command.elapsed();
            self.took(StartupPhase::FirstToken, all);
            tracing::info!("first token {:.3} s after the command", all.as_secs_f64());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_metrics_and_totals_are_taken_once() {
        let metrics = Arc::new(Metrics::new("m", "1"));
        let ago = |seconds| Instant::now().checked_sub(Duration::from_secs(seconds));
        let startup = Startup::new(ago(5).expect("uptime"), Arc::clone(&metrics));
        let value = |phase| metrics.startup(phase).get();
        startup.took(StartupPhase::Plan, Duration::from_millis(250));
        startup.worker_took(StartPhase::Weights, Duration::from_millis(1500));
        assert!(value(StartupPhase::Plan) == 0.25 && value(StartupPhase::Weights) == 1.5);
        assert_eq!(value(StartupPhase::Ready), 0.0);
        startup.ready();
        startup.token();
        let (ready, token) = (value(StartupPhase::Ready), value(StartupPhase::FirstToken));
        assert!((5.0..60.0).contains(&ready) && token >= ready, "{ready} {token}");
        // Another worker's parts replace the first one's; what the command took stays.
        startup.worker_took(StartPhase::Weights, Duration::from_millis(750));
        startup.ready();
        startup.token();
        assert_eq!(value(StartupPhase::Weights), 0.75);
        assert!(value(StartupPhase::Ready) == ready && value(StartupPhase::FirstToken) == token);
    }
}
