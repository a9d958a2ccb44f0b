//! The scheduler's thread: the edge that gives the pure core its events, clock and outputs.
//!
//! It makes no decision of its own. Messages come from the gateway and the supervisor; plans and
//! uploads go to the workers' streams in the order the core says them; results go to each request's
//! channel once the plans of the turn have left. Invariants: an upload leaves before the plan that
//! admits it; a request's channel is dropped right after its last event.

use super::life::{Life, Progress};
use super::plans::Plans;
use super::startup::Startup;
use super::streams::Streams;
use gateway::engine::GenerationEvent;
use ids::{GroupId, Rank, RequestId, ShardId, Timestamp, Tokens};
use scheduler::{Event, Joined, Journal, Output, Pages, Scheduler, Shards, Submit, Why};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};
use step::{StepTiming, ToScheduler, ToWorker};
use telemetry::{BlockState, Metrics, PlacedBy, StepKind, StepsAhead};
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;

/// How often gauges are refreshed while steps run.
const GAUGES: Duration = Duration::from_millis(100);

/// What the driver is told.
pub(crate) enum Message {
    /// A new generation and where its events go.
    Submit(Box<Submit>, UnboundedSender<GenerationEvent>),
    /// Nobody waits for it.
    Abort(RequestId),
    /// A stop string ended after so many output tokens.
    Stop(RequestId, Tokens),
    /// The sessions of a group are open, in the order of ranks.
    GroupUp(Vec<UnboundedSender<ToWorker>>),
    /// What a rank said.
    Worker(Rank, ToScheduler),
    /// The group ended.
    GroupDown,
    /// The server is stopping.
    Drain,
    /// Somebody wants to read the journal.
    Read(oneshot::Sender<Pages>),
}

/// The way to the driver. Sending never blocks; a driver that is gone loses messages, which is
/// seen at the channels it drops.
#[derive(Clone)]
pub(crate) struct Inbox(Sender<Message>);

impl Inbox {
    pub(crate) fn send(&self, message: Message) {
        let _ = self.0.send(message);
    }
}

/// An inbox and what it fills.
pub(crate) fn inbox() -> (Inbox, Receiver<Message>) {
    let (sender, receiver) = channel();
    (Inbox(sender), receiver)
}

/// The scheduler with everything around it.
pub(crate) struct Driver {
    pub(crate) scheduler: Shards,
    /// What is told of it; nothing where none is kept.
    pub(crate) journal: Option<Journal>,
    pub(crate) inbox: Receiver<Message>,
    pub(crate) life: Life,
    pub(crate) progress: Arc<Progress>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) startup: Arc<Startup>,
    pub(crate) origin: Instant,
    /// Sent and not answered.
    pub(crate) plans: Plans,
    /// Whether there were requests after the last outcome.
    pub(crate) pressed: bool,
    /// The step at which this thread is to panic, for tests.
    pub(crate) planted_panic: Option<u64>,
}

impl Driver {
    /// Runs until every sender of the inbox is gone.
    pub(crate) fn run(mut self) {
        let mut streams = Streams::default();
        let mut said = VecDeque::new();
        // When gauges are to be refreshed; nothing while they show the state of an idle scheduler.
        let mut gauges_due = Some(Instant::now());
        loop {
            let first = match self.wait(gauges_due) {
                Ok(message) => Some(message),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let (now, begun) = (self.now(), Instant::now());
            let idle = first.is_none();
            match first {
                Some(message) => self.take(now, message, &mut streams),
                None if self.scheduler.next_wakeup().is_some_and(|at| at <= now) => {
                    self.scheduler.handle(now, Event::Wakeup);
                }
                None => {}
            }
            // Everything that came meanwhile belongs into the same plan.
            while let Ok(message) = self.inbox.try_recv() {
                self.take(now, message, &mut streams);
            }
            let planned = self.plan(&mut said);
            let gone = Instant::now();
            if planned {
                self.metrics.planner.observe(gone.duration_since(begun).as_secs_f64());
            }
            if self.deliver(&mut said, &mut streams) {
                self.metrics.deliver.observe(gone.elapsed().as_secs_f64());
            }
            let delivered = self.now();
            self.note(|journal| journal.delivered(delivered));
            if gauges_due.is_none_or(|due| Instant::now() >= due) {
                self.gauges();
                gauges_due = (!idle).then(|| Instant::now() + GAUGES);
            }
        }
    }

    /// Writes into the journal, where one is kept.
    fn note(&mut self, write: impl FnOnce(&mut Journal)) {
        if let Some(journal) = &mut self.journal {
            write(journal);
        }
    }

    /// Notes who is first in each shard's line.
    fn look(&mut self) {
        if let Some(journal) = &mut self.journal {
            for (shard, scheduler) in (0_u16..).zip(self.scheduler.schedulers()) {
                journal.looked(ShardId(shard), scheduler.first_in_line());
            }
        }
    }

    fn now(&self) -> Timestamp {
        Timestamp::ZERO.after(self.origin.elapsed())
    }

    /// The next message; a timeout when the scheduler or the gauges are due.
    fn wait(&self, gauges_due: Option<Instant>) -> Result<Message, RecvTimeoutError> {
        let wakeup = self.scheduler.next_wakeup().map(|at| at.since(self.now()));
        let gauges = gauges_due.map(|due| due.saturating_duration_since(Instant::now()));
        match (wakeup, gauges) {
            (None, None) => self.inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
            (Some(a), Some(b)) => self.inbox.recv_timeout(a.min(b)),
            (Some(wait), None) | (None, Some(wait)) => self.inbox.recv_timeout(wait),
        }
    }

    fn take(&mut self, now: Timestamp, message: Message, streams: &mut Streams) {
        let event = match message {
            Message::Submit(submit, events) => {
                self.progress.enters(submit.prompt.len() as u64);
                streams.open(submit.request, submit.arrival, events);
                self.note(|journal| journal.submitted(&submit));
                Event::Submit(submit)
            }
            Message::Abort(request) => Event::Abort(request),
            Message::Stop(request, keep) => Event::Stop { request, keep },
            Message::GroupUp(sessions) => return self.life.begin(sessions),
            Message::GroupDown => {
                self.metrics.worker_restarts.inc();
                self.plans.clear();
                match self.life.end() {
                    Some(incarnation) => Event::WorkerLost(incarnation),
                    None => return,
                }
            }
            Message::Worker(rank, said) => match self.life.heard(rank, said) {
                Some(event) => event,
                None => return self.retire(now),
            },
            Message::Drain => return self.progress.drain(),
            Message::Read(ask) => {
                // Where none is kept, nobody asks; who asked and left is not told.
                let _ = self.journal.as_ref().map(|journal| ask.send(journal.read(now)));
                return;
            }
        };
        self.note(|journal| match &event {
            Event::WorkerReady(ready) => journal.ready(now, ready.incarnation),
            Event::WorkerLost(_) => journal.lost(now),
            // Outcomes come joined.
            Event::Outcome(_)
            | Event::Submit(_)
            | Event::Abort(_)
            | Event::Stop { .. }
            | Event::ForcePreempt(_)
            | Event::Wakeup => {}
        });
        self.scheduler.handle(now, event);
        while let Some(placement) = self.scheduler.poll_placement() {
            self.metrics.placements(placed_by(placement.why)).inc();
            tracing::debug!("{placement}");
            self.note(|journal| journal.placed(placement.request, placement.shard));
        }
    }

    /// Takes every step that all ranks have answered alike.
    fn retire(&mut self, now: Timestamp) {
        let diverged = self.life.has_diverged();
        while let Some(joined) = self.life.joined() {
            let timing = timing(&joined);
            let (life, seq) = (joined.incarnation, joined.seq);
            self.note(|journal| journal.answered(now, life, seq, &timing));
            self.observe(&timing);
            self.progress.step_ended();
            if let Some(plan) = self.plans.back(seq) {
                self.scheduler.recycle(plan);
            }
            if joined.outcomes.iter().any(|outcome| !outcome.sampled.is_empty()) {
                self.startup.token();
            }
            self.scheduler.retire(now, joined);
            let gauges = self.scheduler.gauges();
            self.pressed = gauges.running + gauges.waiting > 0;
        }
        if !diverged && self.life.has_diverged() {
            self.metrics.worker_divergences.inc();
        }
    }

    /// A step in numbers.
    fn observe(&self, timing: &StepTiming) {
        let seconds = |ns: u64| ns as f64 / 1e9;
        let metrics = &self.metrics;
        metrics.step_duration.observe(seconds(timing.total_ns));
        let kind = StepKind::of(timing.tokens, timing.prefill_tokens);
        metrics.worker_step(kind, timing.tokens).observe(seconds(timing.model_ns));
        metrics.worker_busy.inc_by(seconds(timing.model_ns));
        metrics.worker_launches.inc_by(u64::from(timing.launches));
        metrics.worker_host_draws.inc_by(u64::from(timing.host_draws));
        metrics.worker_graphs.set(i64::from(timing.graphs));
        metrics.worker_uncaptured.inc_by(u64::from(timing.uncaptured));
        // Without requests a device may rest.
        if self.pressed {
            metrics.worker_idle.inc_by(seconds(timing.idle_ns));
        }
    }

    /// Plans what can be planned; whether that was any step. What is for requests is left in `said`.
    fn plan(&mut self, said: &mut VecDeque<Output>) -> bool {
        let mut any = false;
        loop {
            self.command(said);
            let now = self.now();
            let Some(planned) = self.scheduler.plan_step(now) else { break };
            self.command(said);
            self.look();
            if let Some(journal) = &mut self.journal {
                journal.planned(now, &planned, self.scheduler.stalls());
            }
            self.metrics.steps_planned(StepsAhead::of(planned.report.ahead)).inc();
            let seq = planned.plan.seq;
            assert!(self.planted_panic != Some(seq.0), "planted at step {seq}");
            let plan = self.plans.share(planned.plan);
            self.life.command_all(ToWorker::Step(plan));
            let sent = self.now();
            self.note(|journal| journal.sent(sent, seq));
            any = true;
        }
        self.look();
        self.command(said);
        let gauges = self.scheduler.gauges();
        self.progress.working(gauges.running + gauges.waiting > 0);
        any
    }

    /// Does what the scheduler asks for; what is for requests waits in `said`, in its order.
    fn command(&mut self, said: &mut VecDeque<Output>) {
        while let Some((shard, output)) = self.scheduler.poll_output() {
            if let Output::Upload(_) | Output::Finished { .. } | Output::Refused { .. } = &output {
                let now = self.now();
                self.note(|journal| journal.said(now, &output));
            }
            match output {
                Output::Upload(upload) => self.life.command(shard, ToWorker::Upload(upload)),
                Output::Forget(incarnation, request) => {
                    self.life.command(shard, ToWorker::Forget(incarnation, request));
                }
                Output::RestartWorker { incarnation, reason } => {
                    let why = format!("{reason}; {}", self.life.unanswered());
                    tracing::error!(%incarnation, why, "the workers cannot be trusted");
                    self.life.kill(why);
                }
                for_a_request => said.push_back(for_a_request),
            }
        }
    }

    /// Hands results to their requests; whether there were any. Waking those who wait for them takes
    /// longer than planning does, so the plans have left by then.
    fn deliver(&self, said: &mut VecDeque<Output>, streams: &mut Streams) -> bool {
        let any = !said.is_empty();
        for output in said.drain(..) {
            if let Output::Started { request, .. } = &output
                && let Some(arrival) = streams.arrival(*request)
            {
                let waited = self.now().since(arrival);
                self.metrics.queue_time.observe(waited.as_secs_f64());
            }
            streams.say(output);
        }
        any
    }

    fn gauges(&self) {
        let gauges = self.scheduler.gauges();
        self.metrics.requests_waiting.set(gauges.waiting.into());
        self.metrics.requests_running.set(gauges.running.into());
        self.metrics.kv_cache_usage.set(gauges.cache_usage);
        self.metrics.host_cache_blocks.set(gauges.host_blocks.into());
        let ready = self.progress.readiness() == gateway::engine::Readiness::Ready;
        self.metrics.ready.set(ready.into());
        for (counter, to) in [
            (&self.metrics.preemptions, gauges.preemptions),
            (&self.metrics.prefix_cache_queried, gauges.prefix_query_tokens),
            (&self.metrics.prefix_cache_hit, gauges.prefix_hit_tokens),
            (&self.metrics.host_cache_hit, gauges.host_hit_tokens),
            (&self.metrics.host_cache_stores, gauges.host_stores),
            (&self.metrics.host_cache_loads, gauges.host_loads),
        ] {
            counter.inc_by(to.saturating_sub(counter.get()));
        }
        let mut blocks = [0_u64; 4];
        let mut unbound = 0;
        for cache in self.scheduler.schedulers().iter().filter_map(Scheduler::cache) {
            for group in 0..cache.groups() {
                let counts = cache.counts(GroupId(group as u8));
                let held = counts.owned + counts.shared;
                for (sum, count) in
                    blocks.iter_mut().zip([held, counts.cached, counts.limbo, counts.total()])
                {
                    *sum += u64::from(count.0);
                }
            }
            // Super-blocks that no group holds count as free in units of the first group's blocks.
            unbound += u64::from(cache.unbound()) * self.life.blocks_per_super();
        }
        if self.scheduler.schedulers().iter().all(|shard| shard.cache().is_none()) {
            return;
        }
        let [used, cached, limbo, bound] = blocks;
        let free = (bound + unbound).saturating_sub(used + cached + limbo);
        for (state, count) in [
            (BlockState::Used, used),
            (BlockState::Cached, cached),
            (BlockState::Limbo, limbo),
            (BlockState::Free, free),
        ] {
            self.metrics.kv_blocks(state).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }
}

/// A step of a group in numbers: it took as long as its slowest shard, and did what all did.
fn timing(joined: &Joined) -> StepTiming {
    let mut whole = StepTiming::default();
    for timing in joined.outcomes.iter().map(|outcome| outcome.timing) {
        whole.total_ns = whole.total_ns.max(timing.total_ns);
        whole.model_ns = whole.model_ns.max(timing.model_ns);
        whole.idle_ns = whole.idle_ns.max(timing.idle_ns);
        whole.launches += timing.launches;
        whole.host_draws |= timing.host_draws;
        whole.graphs = whole.graphs.max(timing.graphs);
        whole.uncaptured |= timing.uncaptured;
        whole.tokens += timing.tokens;
        whole.prefill_tokens += timing.prefill_tokens;
    }
    whole
}

const fn placed_by(why: Why) -> PlacedBy {
    match why {
        Why::Prefix => PlacedBy::Prefix,
        Why::Load => PlacedBy::Load,
        Why::LoadOverPrefix => PlacedBy::LoadOverPrefix,
    }
}
