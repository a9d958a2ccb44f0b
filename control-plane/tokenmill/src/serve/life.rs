//! The worker group's life as the driver sees it: loading, hellos, configured, ready, gone.
//!
//! [`Life`] belongs to the driver's thread, [`Progress`] is what other threads may read. Every rank has a
//! stream of its own: steps and the configuration go to all of them, what concerns a request to the ranks
//! of its shard. Invariants: a plan only goes to the sessions of the life it names; nothing of a step is
//! handed on that a rank disagrees about, nor anything after it; readiness means that steps end while
//! there is work.

use super::absence::Absence;
use super::offers::{Offers, agree};
use super::startup::Startup;
use ids::{Bytes, Incarnation, Rank, ShardId, Tokens};
use scheduler::{Divergence, Event, Join, Joined, WorkerReady};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use step::{Configure, Digest, Mesh, Outcome, ToScheduler, ToWorker};
use tokio::sync::mpsc::{Sender, UnboundedSender};

/// Limits that a worker is configured with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WorkerLimits {
    pub(crate) max_slots: u32,
    pub(crate) max_step_tokens: Tokens,
    pub(crate) max_context: Tokens,
}

/// One worker group after another.
pub(crate) struct Life {
    mesh: Mesh,
    limits: WorkerLimits,
    progress: Arc<Progress>,
    startup: Arc<Startup>,
    /// Asks the supervisor to kill the group, and says why.
    kill: Sender<String>,
    incarnation: Incarnation,
    /// By rank; empty while there is no group.
    sessions: Vec<UnboundedSender<ToWorker>>,
    /// What each shard was told in this life.
    told: Vec<Digest>,
    join: Join,
    offers: Offers,
    /// Loaded and to load, by rank.
    loading: Vec<(Bytes, Bytes)>,
    blocks_per_super: u32,
    ready: bool,
    /// Set when a rank disagreed: nothing the group says counts any more.
    diverged: bool,
}

impl Life {
    pub(crate) fn new(
        mesh: Mesh,
        limits: WorkerLimits,
        progress: Arc<Progress>,
        startup: Arc<Startup>,
        kill: Sender<String>,
    ) -> Self {
        Self {
            mesh,
            limits,
            progress,
            startup,
            kill,
            incarnation: Incarnation(0),
            sessions: Vec::new(),
            told: Vec::new(),
            join: Join::new(mesh),
            offers: Offers::default(),
            loading: Vec::new(),
            blocks_per_super: 1,
            ready: false,
            diverged: false,
        }
    }

    /// Blocks of the first group that one super-block holds.
    pub(crate) fn blocks_per_super(&self) -> u64 {
        self.blocks_per_super.into()
    }

    /// The sessions of every rank are open.
    pub(crate) fn begin(&mut self, sessions: Vec<UnboundedSender<ToWorker>>) {
        self.incarnation = self.incarnation.next();
        self.offers = Offers::new(sessions.len());
        self.loading = vec![(Bytes::ZERO, Bytes::ZERO); sessions.len()];
        self.sessions = sessions;
        self.told = self.mesh.shards().map(|_| Digest::none()).collect();
        self.join.begin(self.incarnation);
        self.diverged = false;
    }

    /// Sends what concerns a request to its shard's ranks, if there are any.
    pub(crate) fn command(&mut self, shard: ShardId, command: ToWorker) {
        if self.sessions.is_empty() {
            return;
        }
        if let Some(told) = self.told.get_mut(shard.index()) {
            told.take(&command);
        }
        let ranks = self.mesh.members(shard);
        send(ranks.filter_map(|rank| self.sessions.get(rank.index())), command);
    }

    /// Sends a step or the configuration to every rank, if there are any.
    pub(crate) fn command_all(&mut self, command: ToWorker) {
        if self.sessions.is_empty() {
            return;
        }
        self.told.iter_mut().for_each(|told| told.take(&command));
        if let ToWorker::Step(plan) = &command {
            self.join.sent(plan.seq, &self.told);
        }
        send(self.sessions.iter(), command);
    }

    /// Asks for the end of this life.
    pub(crate) fn kill(&self, why: String) {
        // A full channel already holds the same wish.
        let _ = self.kill.try_send(why);
    }

    /// Why a group is to be killed that does not answer: who owes what.
    pub(crate) fn unanswered(&self) -> String {
        let Some((seq, ranks)) = self.join.missing() else { return "no step is open".to_owned() };
        let names: Vec<String> = ranks.iter().map(|rank| format!("rank {rank}")).collect();
        format!("step {seq} was not answered by {} of {}", names.join(", "), self.mesh)
    }

    /// What a rank said, as an event for the scheduler where it is one.
    pub(crate) fn heard(&mut self, rank: Rank, said: ToScheduler) -> Option<Event> {
        match said {
            ToScheduler::Loading(progress) => {
                *self.loading.get_mut(rank.index())? = (progress.done, progress.total);
                let sum = |of: fn(&(Bytes, Bytes)) -> Bytes| self.loading.iter().map(of).sum();
                self.progress.loading(sum(|(done, _)| *done), sum(|(_, total)| *total));
                None
            }
            ToScheduler::Started(phase, took) => {
                // Ranks start together; one stands for all.
                if rank == Rank(0) {
                    self.startup.worker_took(phase, took);
                }
                None
            }
            ToScheduler::Hello(hello) => {
                self.offers.hello(rank, hello);
                self.configure();
                None
            }
            ToScheduler::Ready(incarnation) if incarnation == self.incarnation => {
                let (groups, carving) = self.offers.ready(rank)?;
                self.ready = true;
                self.progress.ready();
                self.startup.ready();
                Some(Event::WorkerReady(Box::new(WorkerReady { incarnation, groups, carving })))
            }
            ToScheduler::Outcome(outcome) => {
                self.answered(rank, outcome);
                None
            }
            // A stale `Ready` names a life that is over; a fault is the supervisor's to report.
            ToScheduler::Ready(_) | ToScheduler::Fault(_) => None,
        }
    }

    fn answered(&mut self, rank: Rank, outcome: Outcome) {
        if !self.diverged
            && let Err(divergence) = self.join.heard(rank, outcome)
        {
            self.diverge(&divergence);
        }
    }

    /// The next step that every rank has answered alike.
    pub(crate) fn joined(&mut self) -> Option<Joined> {
        if self.diverged {
            return None;
        }
        match self.join.whole() {
            Ok(joined) => joined,
            Err(divergence) => {
                self.diverge(&divergence);
                None
            }
        }
    }

    fn diverge(&mut self, divergence: &Divergence) {
        self.diverged = true;
        tracing::error!(incarnation = %self.incarnation, %divergence, "ranks disagree");
        self.kill(divergence.to_string());
    }

    /// Whether the ranks of this life disagreed.
    pub(crate) const fn has_diverged(&self) -> bool {
        self.diverged
    }

    /// Configures every rank alike, once all have said what they are.
    fn configure(&mut self) {
        let Some(hellos) = self.offers.complete() else { return };
        let (groups, carving) = match agree(self.mesh, &hellos) {
            Ok(agreed) => agreed,
            Err(why) => {
                tracing::error!("{why}");
                return self.kill(why);
            }
        };
        for (rank, hello) in self.mesh.ranks().zip(&hellos) {
            tracing::info!(
                incarnation = %self.incarnation,
                %rank,
                mesh = %hello.seat.mesh,
                backend = hello.backend,
                weight_bytes = hello.weight_bytes.0,
                cache_bytes = hello.cache_bytes.0,
                host_bytes = hello.host_bytes.0,
                "a rank is loaded"
            );
        }
        self.command_all(ToWorker::Configure(Configure {
            incarnation: self.incarnation,
            max_slots: self.limits.max_slots,
            max_step_tokens: self.limits.max_step_tokens,
            max_context: self.limits.max_context,
            carving: carving.clone(),
        }));
        self.blocks_per_super = carving.per_super.first().copied().unwrap_or(1);
        self.offers.configured(groups, carving);
    }

    /// The sessions ended; the incarnation that was lost, if it had begun to work.
    pub(crate) fn end(&mut self) -> Option<Incarnation> {
        self.sessions.clear();
        self.progress.lost();
        std::mem::take(&mut self.ready).then_some(self.incarnation)
    }
}

/// The last one gets the command itself. A session that broke says so through the supervisor.
fn send<'a>(sessions: impl Iterator<Item = &'a UnboundedSender<ToWorker>>, command: ToWorker) {
    let mut sessions = sessions.peekable();
    while let Some(session) = sessions.next() {
        if sessions.peek().is_none() {
            let _ = session.send(command);
            return;
        }
        let _ = session.send(command.clone());
    }
}

/// What other threads may know: whether requests make progress, and how much waits.
#[derive(Debug)]
pub(crate) struct Progress {
    phase: Mutex<Phase>,
    absence: Mutex<Absence>,
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
    Lost,
    Draining,
}

impl Progress {
    pub(crate) fn new(patience: Duration) -> Self {
        let origin = Instant::now();
        Self {
            phase: Mutex::new(Phase::Loading(0)),
            absence: Mutex::new(Absence::new(origin)),
            origin,
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
        self.absence().serves(Instant::now());
        self.set(Phase::Ready);
    }

    fn lost(&self) {
        self.absence().lost(Instant::now());
        self.set(Phase::Lost);
    }

    fn absence(&self) -> MutexGuard<'_, Absence> {
        self.absence.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A group is started after this pause.
    pub(crate) fn starts_in(&self, pause: Duration) {
        self.absence().begins(Instant::now() + pause);
    }

    /// Whether a new request may wait for a group that is gone: not where that takes long.
    pub(crate) fn is_worth_waiting_for(&self) -> bool {
        self.absence().outlook(Instant::now()).is_some_and(|outlook| !outlook.long)
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
        let outlook = self.absence().outlook(Instant::now());
        match (phase, outlook) {
            (Phase::Draining, _) => gateway::engine::Readiness::Draining,
            // Also while the next one loads.
            (_, Some(outlook)) => gateway::engine::Readiness::Restarting { left: outlook.left },
            (Phase::Loading(percent), None) => gateway::engine::Readiness::Loading { percent },
            // The first one is gone before it served; the server is about to end.
            (Phase::Lost, None) => gateway::engine::Readiness::Loading { percent: 0 },
            (Phase::Ready, None) => {
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
        progress.lost();
        progress.loading(Bytes(1), Bytes(2));
        let gone = progress.readiness();
        assert!(matches!(gone, gateway::engine::Readiness::Restarting { .. }), "{gone:?}");
        assert!(progress.is_worth_waiting_for(), "it started in no time");
        progress.starts_in(crate::serve::absence::PATIENCE + Duration::from_secs(1));
        assert!(!progress.is_worth_waiting_for(), "but is to pause for long");
        progress.ready();
        assert_eq!(progress.readiness(), gateway::engine::Readiness::Ready);
        assert!(!progress.is_worth_waiting_for(), "it is there");
        progress.drain();
        progress.ready();
        assert_eq!(progress.readiness(), gateway::engine::Readiness::Draining, "a drain is final");
    }
}
