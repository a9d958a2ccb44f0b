//! The world's loop: whatever is next in virtual time happens, the scheduler answers, everything
//! it says is checked.
//!
//! It makes no scheduling decision. Invariant: after each event the cache adds up, every output is
//! one that its client can justify, and the plan stream was carried out without complaint.

use crate::client::{Client, VOCAB};
use crate::rng::Rng;
use crate::scenario::Scenario;
use crate::worker::Worker;
use core::time::Duration;
use ids::{Incarnation, RequestId, StepSeq, Timestamp, TokenId, Tokens};
use scheduler::{Event, FinishReason, Gauges, Output, Refusal, Scheduler, WorkerReady};
use std::collections::{BTreeMap, BTreeSet};
use step::{Outcome, StepPlan};

mod digest;
mod traffic;

/// Full recounts are made once in so many events.
const RECOUNT_EVERY: u64 = 16;
/// A run that needs this many times its events to settle is stuck.
const PATIENCE: u64 = 40;

/// What was wrong, and how to see it again.
#[derive(Clone, Debug, thiserror::Error)]
#[error("seed {seed}, event {event}: {what}")]
pub struct Violation {
    /// The seed.
    pub seed: u64,
    /// Events handled before.
    pub event: u64,
    /// What was found.
    pub what: String,
}

/// What a run did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    /// Events handled.
    pub events: u64,
    /// Virtual time at the end.
    pub time: Timestamp,
    /// Requests accepted.
    pub requests: u64,
    /// Requests turned away.
    pub refused: u64,
    /// Ends by kind: natural, stop string, abort, deadline, worker's death.
    pub ends: [u64; 5],
    /// Tokens streamed.
    pub tokens: u64,
    /// Steps carried out.
    pub steps: u64,
    /// Steps planned while the cache was at least 95 % held or cached.
    pub full_cache_steps: u64,
    /// Longest time from submission to first admission.
    pub longest_wait: Duration,
    /// The scheduler's own figures at the end.
    pub gauges: Gauges,
    /// Over every plan and output.
    pub digest: u64,
}

enum Happening {
    Arrive,
    Abort(RequestId),
    Stop(RequestId, u32),
    Deliver(Box<Outcome>),
    Die(Incarnation),
    Ready,
}

/// One seeded run.
pub struct World {
    scenario: Scenario,
    rng: Rng,
    now: Timestamp,
    agenda: BTreeMap<(Timestamp, u64), Happening>,
    scheduled: u64,
    scheduler: Scheduler,
    worker: Option<Worker>,
    incarnation: Incarnation,
    launched: StepSeq,
    retired: StepSeq,
    /// Outcomes refused because an earlier one is missing.
    early: BTreeMap<StepSeq, Outcome>,
    busy_until: Timestamp,
    clients: BTreeMap<RequestId, Client>,
    /// Ranks of requests that were never admitted.
    unstarted: BTreeSet<(i32, Timestamp, RequestId)>,
    documents: Vec<Vec<TokenId>>,
    next_request: u64,
    /// Whether this life's worker gave reason to distrust it.
    misbehaved: bool,
    figures: Figures,
}

type Check<T = ()> = Result<T, String>;

impl World {
    /// A world at its beginning.
    ///
    /// # Errors
    /// When the scenario's limits contradict each other.
    pub fn new(scenario: Scenario) -> Result<Self, scheduler::ConfigError> {
        let mut rng = Rng::new(scenario.seed);
        let scheduler = Scheduler::new(scenario.config.clone())?;
        let documents =
            (0..4).map(|_| (0..scenario.prompt_most).map(|_| token(&mut rng)).collect()).collect();
        let mut world = Self {
            scenario,
            rng,
            now: Timestamp::ZERO,
            agenda: BTreeMap::new(),
            scheduled: 0,
            scheduler,
            worker: None,
            incarnation: Incarnation(0),
            launched: StepSeq::ZERO,
            retired: StepSeq::ZERO,
            early: BTreeMap::new(),
            busy_until: Timestamp::ZERO,
            clients: BTreeMap::new(),
            unstarted: BTreeSet::new(),
            documents,
            next_request: 1,
            misbehaved: false,
            figures: Figures::default(),
        };
        world.after(Duration::ZERO, Happening::Arrive);
        // The first requests come before there is a worker.
        world.after(Duration::from_millis(100), Happening::Ready);
        Ok(world)
    }

    /// Runs to the end: the last request ended and nothing left to happen.
    ///
    /// # Errors
    /// At the first thing that is wrong.
    pub fn run(mut self) -> Result<Figures, Violation> {
        let seed = self.scenario.seed;
        match self.live() {
            Ok(()) => Ok(self.figures),
            Err(what) => Err(Violation { seed, event: self.figures.events, what }),
        }
    }

    fn live(&mut self) -> Check {
        loop {
            let next = self.agenda.first_key_value().map(|(at, _)| *at);
            let wakeup = self.scheduler.next_wakeup();
            match (next, wakeup) {
                (None, None) => return self.settle(),
                (Some((at, _)), Some(wake)) if wake < at => self.wake(wake)?,
                (None, Some(wake)) => self.wake(wake)?,
                (Some(key), _) => {
                    self.now = self.now.max(key.0);
                    if let Some(happening) = self.agenda.remove(&key) {
                        self.happen(happening)?;
                    }
                }
            }
            if self.figures.events > self.scenario.events.saturating_mul(PATIENCE) + 100_000 {
                let waits = self.scheduler.explain();
                return Err(format!("{} requests never end: {waits:?}", self.clients.len()));
            }
        }
    }

    fn wake(&mut self, at: Timestamp) -> Check {
        self.now = self.now.max(at);
        self.handle(Event::Wakeup)
    }

    fn happen(&mut self, happening: Happening) -> Check {
        let last_orders = self.figures.events >= self.scenario.events;
        match happening {
            Happening::Arrive if last_orders => Ok(()),
            Happening::Arrive => self.arrive(),
            Happening::Abort(request) => {
                if let Some(client) = self.clients.get_mut(&request) {
                    client.asked.push(FinishReason::Aborted);
                }
                self.handle(Event::Abort(request))
            }
            Happening::Stop(request, keep) => {
                if let Some(client) = self.clients.get_mut(&request) {
                    client.keeps.push(keep);
                }
                self.handle(Event::Stop { request, keep: Tokens(keep) })
            }
            Happening::Deliver(outcome) => self.deliver(*outcome),
            Happening::Die(incarnation) if incarnation != self.incarnation => Ok(()),
            Happening::Die(incarnation) => {
                if self.worker.take().is_some() {
                    self.misbehaved = true;
                    self.after(Duration::from_millis(50), Happening::Ready);
                    // Sometimes only the next life tells that the last is over.
                    if !self.rng.one_in(4) {
                        return self.handle(Event::WorkerLost(incarnation));
                    }
                }
                Ok(())
            }
            Happening::Ready => self.begin_life(),
        }
    }

    fn begin_life(&mut self) -> Check {
        self.incarnation = self.incarnation.next();
        self.launched = StepSeq::ZERO;
        self.retired = StepSeq::ZERO;
        self.early.clear();
        self.misbehaved = false;
        self.busy_until = self.now;
        let (groups, carving) = (self.scenario.groups.clone(), self.scenario.carving.clone());
        let slots = self.scenario.config.max_running;
        self.worker = Some(Worker::new(self.incarnation, &groups, &carving, slots));
        let ready = WorkerReady { incarnation: self.incarnation, groups, carving };
        self.handle(Event::WorkerReady(Box::new(ready)))
    }

    fn deliver(&mut self, outcome: Outcome) -> Check {
        let due = self.retired.next();
        if outcome.incarnation == self.incarnation && self.worker.is_some() {
            if outcome.seq > due && outcome.seq <= self.launched {
                // The transport tries again, once what was missing is there.
                self.early.insert(outcome.seq, outcome.clone());
            }
            if outcome.seq == due {
                // Taken, or a lie that ends this life.
                self.retired = due;
                if let Some(next) = self.early.remove(&due.next()) {
                    self.after(Duration::ZERO, Happening::Deliver(Box::new(next)));
                }
            }
        }
        self.handle(Event::Outcome(outcome))
    }

    /// Hands an event in, checks all that follows.
    fn handle(&mut self, event: Event) -> Check {
        self.figures.events += 1;
        self.scheduler.handle(self.now, event);
        self.drain()?;
        let faulty = self.figures.events < self.scenario.events;
        if faulty && self.rng.one_in(self.scenario.preemptions) {
            let nth = self.rng.below(self.clients.len() as u64);
            if let Some(request) = self.clients.keys().nth(nth as usize).copied() {
                self.figures.events += 1;
                self.scheduler.handle(self.now, Event::ForcePreempt(request));
                self.drain()?;
            }
        }
        while let Some(planned) = self.scheduler.plan_step(self.now) {
            self.note_plan(&planned.plan);
            let report = planned.report;
            if report.decode + report.chunks == 0 {
                return Err("a step that runs nothing".into());
            }
            // Outputs said while planning are about later steps; the plan goes first.
            self.carry_out(&planned.plan)?;
            self.drain()?;
        }
        self.drain()?;
        self.check()
    }

    fn check(&mut self) -> Check {
        let Some(cache) = self.scheduler.cache() else { return Ok(()) };
        cache.check_totals().map_err(|imbalance| imbalance.to_string())?;
        if self.figures.events.is_multiple_of(RECOUNT_EVERY) {
            cache.check().map_err(|imbalance| imbalance.to_string())?;
        }
        Ok(())
    }

    fn carry_out(&mut self, plan: &StepPlan) -> Check {
        // A dead worker's stream takes what is written to it and never answers.
        let Some(worker) = &mut self.worker else { return Ok(()) };
        let outcome = worker.step(plan, self.retired)?;
        for request in worker.seated() {
            if !self.clients.contains_key(&request) {
                return Err(format!("{request} ended and is in a later step"));
            }
        }
        self.figures.steps += 1;
        self.launched = plan.seq;
        self.count_full();
        self.travel(outcome);
        Ok(())
    }

    /// How and when, if at all, an outcome gets back.
    fn travel(&mut self, mut outcome: Outcome) {
        let (decode, prefill) =
            (outcome.timing.tokens - outcome.timing.prefill_tokens, outcome.timing.prefill_tokens);
        let ns = 2_000_000 + 100_000 * u64::from(decode) + 10_000 * u64::from(prefill);
        let ns = ns * (80 + self.rng.below(40)) / 100;
        outcome.timing.total_ns = ns;
        outcome.timing.model_ns = ns;
        self.busy_until = self.busy_until.max(self.now).after(Duration::from_nanos(ns));
        let mut delay = self.busy_until.since(self.now);
        let incarnation = self.incarnation;
        let faulty = self.figures.events < self.scenario.events;
        if faulty && self.rng.one_in(self.scenario.deaths) {
            self.after(delay / 2, Happening::Die(incarnation));
        }
        if faulty && self.rng.one_in(self.scenario.losses) {
            self.misbehaved = true;
            return;
        }
        if faulty && self.rng.one_in(self.scenario.lies) {
            self.misbehaved = true;
            match outcome.sampled.pop() {
                Some(mut sampled) if self.rng.one_in(2) => {
                    sampled.generation = sampled.generation.next();
                    outcome.sampled.push(sampled);
                }
                _ => {}
            }
            let never = Outcome { seq: StepSeq(outcome.seq.0 + 100), ..outcome.clone() };
            self.after(delay, Happening::Deliver(Box::new(never)));
        }
        if faulty && self.rng.one_in(self.scenario.reorders) {
            delay += Duration::from_nanos(3 * ns);
        }
        if faulty && self.rng.one_in(self.scenario.lates) {
            delay += Duration::from_millis(300);
        }
        if faulty && self.rng.one_in(self.scenario.repeats) {
            let again = Happening::Deliver(Box::new(outcome.clone()));
            self.after(delay + Duration::from_nanos(ns), again);
        }
        self.after(delay, Happening::Deliver(Box::new(outcome)));
    }

    fn count_full(&mut self) {
        let Some(cache) = self.scheduler.cache() else { return };
        self.figures.full_cache_steps += u64::from(cache.unbound() * 20 <= cache.supers());
    }

    fn drain(&mut self) -> Check {
        while let Some(output) = self.scheduler.poll_output() {
            self.note_output(&output);
            self.receive(output)?;
        }
        Ok(())
    }

    fn receive(&mut self, output: Output) -> Check {
        match output {
            Output::Upload(upload) => match &mut self.worker {
                Some(worker) => worker.upload(&upload),
                None => Ok(()),
            },
            Output::Forget(_, request) => {
                if let Some(worker) = &mut self.worker {
                    worker.forget(request);
                }
                Ok(())
            }
            Output::Started { request, cached } => {
                let client = self.client(request)?;
                client.started(cached).map_err(|what| format!("{request}: {what}"))?;
                let (rank, arrival) = (rank_of(client), client.submit.arrival);
                let waited = self.now.since(arrival);
                self.figures.longest_wait = self.figures.longest_wait.max(waited);
                // Where the longest waiting goes first in the end, it may be of any class.
                let patience = self.scenario.config.patience;
                if patience == 0 && self.unstarted.first() != Some(&rank) {
                    return Err(format!("{request} overtook {:?}", self.unstarted.first()));
                }
                self.unstarted.remove(&rank);
                Ok(())
            }
            Output::Token { request, token, .. } => {
                self.figures.tokens += 1;
                let client = self.client(request)?;
                client.token(token).map_err(|what| format!("{request}: {what}"))?;
                let due = client.stop_at.filter(|(at, _)| *at == client.got());
                if let Some((_, keep)) = due {
                    let delay = Duration::from_micros(self.rng.below(20_000));
                    self.after(delay, Happening::Stop(request, keep));
                    if self.rng.one_in(8) {
                        // More tokens than it can have got: must change nothing.
                        self.after(delay / 2, Happening::Stop(request, 5000));
                    }
                }
                Ok(())
            }
            Output::PromptLogprobs(part) => {
                let request = part.request;
                let taken = self.client(request)?.prompt_part(&part);
                taken.map_err(|what| format!("{request}: {what}"))
            }
            Output::Finished { request, reason, usage } => {
                let client = self.client(request)?;
                client.finished(reason, usage).map_err(|what| format!("{request}: {what}"))?;
                let rank = rank_of(client);
                self.unstarted.remove(&rank);
                self.clients.remove(&request);
                let kind = match reason {
                    FinishReason::Stop(_) | FinishReason::Length => 0,
                    FinishReason::StopString => 1,
                    FinishReason::Aborted => 2,
                    FinishReason::Deadline => 3,
                    FinishReason::WorkerDied { .. } => 4,
                    FinishReason::Refused(
                        Refusal::CacheTooSmall { .. }
                        | Refusal::Shed { .. }
                        | Refusal::DeadlineUnreachable { .. },
                    ) => {
                        self.figures.refused += 1;
                        return Ok(());
                    }
                    FinishReason::Fault(_) | FinishReason::Refused(_) => {
                        return Err(format!("{request} ended {reason:?}"));
                    }
                };
                self.figures.ends[kind] += 1;
                Ok(())
            }
            Output::Refused { request, .. } => {
                let rank = rank_of(self.client(request)?);
                self.unstarted.remove(&rank);
                self.clients.remove(&request);
                self.figures.refused += 1;
                Ok(())
            }
            Output::RestartWorker { incarnation, reason } => {
                if !self.misbehaved {
                    return Err(format!("an honest worker is to be restarted: {reason}"));
                }
                self.after(Duration::from_millis(1), Happening::Die(incarnation));
                Ok(())
            }
        }
    }

    fn client(&mut self, request: RequestId) -> Check<&mut Client> {
        self.clients.get_mut(&request).ok_or_else(|| format!("{request} had ended"))
    }

    /// Nothing can happen any more: nobody may be left, and nothing may be held.
    fn settle(&mut self) -> Check {
        if let Some(request) = self.clients.keys().next() {
            let waits = self.scheduler.explain();
            let cache = self.scheduler.cache().map(|cache| {
                let groups = (0..cache.groups()).map(|i| cache.counts(ids::GroupId(i as u8)));
                (groups.collect::<Vec<_>>(), cache.unbound(), cache.supers())
            });
            return Err(format!("{request} is stuck; {waits:?} {cache:?}"));
        }
        if let Some(cache) = self.scheduler.cache() {
            cache.check().map_err(|imbalance| imbalance.to_string())?;
            for group in 0..cache.groups() {
                let counts = cache.counts(ids::GroupId(group as u8));
                if !(counts.owned + counts.shared + counts.limbo).is_zero() {
                    return Err(format!("blocks are held at the end: {counts:?}"));
                }
            }
        }
        self.figures.time = self.now;
        self.figures.gauges = self.scheduler.gauges();
        Ok(())
    }

    fn after(&mut self, delay: Duration, happening: Happening) {
        self.scheduled += 1;
        self.agenda.insert((self.now.after(delay), self.scheduled), happening);
    }
}

fn token(rng: &mut Rng) -> TokenId {
    TokenId(1 + rng.below_u32(VOCAB - 1))
}

fn rank_of(client: &Client) -> (i32, Timestamp, RequestId) {
    (client.submit.priority, client.submit.arrival, client.submit.request)
}
