//! The worker's life as the driver sees it: loading, hello, configured, ready, gone.
//!
//! [`Life`] belongs to the driver's thread, [`Progress`] is what other threads may read. Invariants:
//! a plan only goes to the session of the life it names; readiness means that steps end while there
//! is work.

use super::startup::Startup;
use ids::{Bytes, Incarnation, Tokens};
use scheduler::{Event, WorkerReady};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use step::{Carving, Configure, Hello, ToScheduler, ToWorker};
use tokio::sync::mpsc::{Sender, UnboundedSender};

/// Limits that a worker is configured with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WorkerLimits {
    pub(crate) max_slots: u32,
    pub(crate) max_step_tokens: Tokens,
    pub(crate) max_context: Tokens,
}

/// One worker after another.
pub(crate) struct Life {
    limits: WorkerLimits,
    progress: Arc<Progress>,
    startup: Arc<Startup>,
    /// Asks the supervisor to kill the process.
    kill: Sender<()>,
    incarnation: Incarnation,
    session: Option<UnboundedSender<ToWorker>>,
    offer: Option<(Hello, Carving)>,
    blocks_per_super: u32,
    ready: bool,
}

impl Life {
    pub(crate) fn new(
        limits: WorkerLimits,
        progress: Arc<Progress>,
        startup: Arc<Startup>,
        kill: Sender<()>,
    ) -> Self {
        Self {
            limits,
            progress,
            startup,
            kill,
            incarnation: Incarnation(0),
            session: None,
            offer: None,
            blocks_per_super: 1,
            ready: false,
        }
    }

    /// Blocks of the first group that one super-block holds.
    pub(crate) fn blocks_per_super(&self) -> u64 {
        self.blocks_per_super.into()
    }

    /// A session is open.
    pub(crate) fn begin(&mut self, session: UnboundedSender<ToWorker>) {
        self.incarnation = self.incarnation.next();
        self.session = Some(session);
        self.offer = None;
    }

    /// Sends to the worker, if there is one.
    pub(crate) fn command(&self, command: ToWorker) {
        if let Some(session) = &self.session {
            // A session that broke says so through the supervisor.
            let _ = session.send(command);
        }
    }

    /// Asks for the end of this life.
    pub(crate) fn kill(&self) {
        // A full channel already holds the same wish.
        let _ = self.kill.try_send(());
    }

    /// What the worker said, as an event for the scheduler where it is one.
    pub(crate) fn heard(&mut self, said: ToScheduler) -> Option<Event> {
        match said {
            ToScheduler::Loading(progress) => {
                self.progress.loading(progress.done, progress.total);
                None
            }
            ToScheduler::Started(phase, took) => {
                self.startup.worker_took(phase, took);
                None
            }
            ToScheduler::Hello(hello) => {
                self.configure(hello);
                None
            }
            ToScheduler::Ready(incarnation) if incarnation == self.incarnation => {
                let (hello, carving) = self.offer.take()?;
                self.ready = true;
                self.progress.ready();
                self.startup.ready();
                tracing::info!(%incarnation, backend = hello.backend, "the worker is ready");
                let groups = hello.groups;
                Some(Event::WorkerReady(Box::new(WorkerReady { incarnation, groups, carving })))
            }
            ToScheduler::Outcome(outcome) => Some(Event::Outcome(outcome)),
            // A stale `Ready` names a life that is over; a fault is the supervisor's to report.
            ToScheduler::Ready(_) | ToScheduler::Fault(_) => None,
        }
    }

    fn configure(&mut self, hello: Hello) {
        let carving = match kv_cache::carve(&hello.groups, hello.cache_bytes, hello.alignment) {
            Ok(carving) => carving,
            Err(error) => {
                tracing::error!(%error, "the worker's cache cannot be divided");
                return self.kill();
            }
        };
        self.command(ToWorker::Configure(Configure {
            incarnation: self.incarnation,
            max_slots: self.limits.max_slots,
            max_step_tokens: self.limits.max_step_tokens,
            max_context: self.limits.max_context,
            carving: carving.clone(),
        }));
        self.blocks_per_super = carving.per_super.first().copied().unwrap_or(1);
        self.offer = Some((hello, carving));
    }

    /// The session ended; the incarnation that was lost, if it had begun to work.
    pub(crate) fn end(&mut self, reason: &str) -> Option<Incarnation> {
        self.session = None;
        self.offer = None;
        self.progress.restarting(reason);
        std::mem::take(&mut self.ready).then_some(self.incarnation)
    }
}

/// What other threads may know: whether requests make progress, and how much waits.
#[derive(Debug)]
pub(crate) struct Progress {
    phase: Mutex<Phase>,
    origin: Instant,
    /// Of the newest ended step or the newest start of work, in ns since `origin`.
    moved: AtomicU64,
    working: AtomicBool,
    /// Sent to the driver and not seen by it: requests and prompt tokens.
    knocking: AtomicU32,
    knocking_tokens: AtomicU64,
    /// Work without an ended step for this long is a stall.
    patience: Duration,
}

#[derive(Clone, Debug, PartialEq)]
enum Phase {
    Loading(u8),
    Ready,
    Restarting,
    Draining,
}

impl Progress {
    pub(crate) fn new(patience: Duration) -> Self {
        Self {
            phase: Mutex::new(Phase::Loading(0)),
            origin: Instant::now(),
            moved: AtomicU64::new(0),
            working: AtomicBool::new(false),
            knocking: AtomicU32::new(0),
            knocking_tokens: AtomicU64::new(0),
            patience,
        }
    }

    fn set(&self, phase: Phase) {
        let mut current = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        if *current != Phase::Draining {
            *current = phase;
        }
    }

    fn loading(&self, done: Bytes, total: Bytes) {
        let percent = (done.0.saturating_mul(100)).checked_div(total.0).unwrap_or(0).min(100);
        self.set(Phase::Loading(percent as u8));
    }

    fn ready(&self) {
        self.step_ended();
        self.set(Phase::Ready);
    }

    fn restarting(&self, _reason: &str) {
        self.set(Phase::Restarting);
    }

    pub(crate) fn drain(&self) {
        self.set(Phase::Draining);
    }

    pub(crate) fn step_ended(&self) {
        let now = u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.moved.store(now, Ordering::Relaxed);
    }

    pub(crate) fn working(&self, working: bool) {
        if working && !self.working.swap(true, Ordering::Relaxed) {
            self.step_ended();
        } else if !working {
            self.working.store(false, Ordering::Relaxed);
        }
    }

    /// A request is about to be sent to the driver; false, and nothing is noted, when too many are
    /// on their way already.
    pub(crate) fn knocks(&self, most: u32, tokens: u64, tokens_most: u64) -> bool {
        let before = self.knocking.fetch_add(1, Ordering::Relaxed);
        let tokens_before = self.knocking_tokens.fetch_add(tokens, Ordering::Relaxed);
        let taken = before < most && tokens_before.saturating_add(tokens) <= tokens_most;
        if !taken {
            self.enters(tokens);
        }
        taken
    }

    /// The driver saw it.
    pub(crate) fn enters(&self, tokens: u64) {
        self.knocking.fetch_sub(1, Ordering::Relaxed);
        self.knocking_tokens.fetch_sub(tokens, Ordering::Relaxed);
    }

    /// Whether requests make progress.
    pub(crate) fn readiness(&self) -> gateway::engine::Readiness {
        let phase = self.phase.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match phase {
            Phase::Loading(percent) => gateway::engine::Readiness::Loading { percent },
            Phase::Restarting => gateway::engine::Readiness::Restarting,
            Phase::Draining => gateway::engine::Readiness::Draining,
            Phase::Ready => {
                let moved = Duration::from_nanos(self.moved.load(Ordering::Relaxed));
                let still = self.origin.elapsed().saturating_sub(moved);
                if self.working.load(Ordering::Relaxed) && still > self.patience {
                    gateway::engine::Readiness::Stalled
                } else {
                    gateway::engine::Readiness::Ready
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_on_their_way_are_bounded_by_number_and_tokens() {
        let progress = Progress::new(Duration::from_secs(1));
        assert!(progress.knocks(2, 60, 100));
        assert!(!progress.knocks(2, 41, 100), "101 tokens");
        assert!(progress.knocks(2, 40, 100));
        assert!(!progress.knocks(2, 0, 100), "three requests");
        progress.enters(60);
        assert!(progress.knocks(2, 60, 100), "what was refused is not counted");
    }

    #[test]
    fn readiness_means_that_steps_end() {
        let progress = Progress::new(Duration::from_millis(30));
        assert_eq!(progress.readiness(), gateway::engine::Readiness::Loading { percent: 0 });
        progress.ready();
        progress.working(true);
        assert_eq!(progress.readiness(), gateway::engine::Readiness::Ready);
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(progress.readiness(), gateway::engine::Readiness::Stalled);
        progress.step_ended();
        assert_eq!(progress.readiness(), gateway::engine::Readiness::Ready);
        progress.working(false);
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(progress.readiness(), gateway::engine::Readiness::Ready, "idle is no stall");
        progress.drain();
        progress.ready();
        assert_eq!(progress.readiness(), gateway::engine::Readiness::Draining, "a drain is final");
    }
}
