//! The data-parallel shards of one worker group: a [`Scheduler`] each, in lockstep.
//!
//! A step is one plan with a section per shard, so shards are planned together: when every one of them
//! may plan, and as one step for all of them; a shard without work is in it and stands still. Each
//! shard numbers its own steps; the numbers that workers see are the group's. Where a request runs is
//! decided when it is submitted (`place`) and kept, also when the group dies. With one shard everything
//! is passed through. Invariants: no shard is ever a step ahead of another; a request that must run alone
//! has no other beside it in any shard.

mod beside;
mod join;
mod place;
mod sum;

pub(crate) use beside::Beside;
pub use join::{Divergence, Join, Joined};
pub use place::{Placement, Weighed, Why};

use crate::config::{Config, ConfigError};
use crate::event::{Event, Submit};
use crate::output::{Output, Refusal, WorkerFault};
use crate::report::{Gauges, PlanReport, Planned, Unfit, Waits};
use crate::scheduler::{Scheduler, count};
use ids::{Incarnation, RequestId, ShardId, StepSeq, Timestamp, Tokens};
use std::collections::{BTreeMap, VecDeque};
use step::{Outcome, Section, StepPlan};

/// The schedulers of a group.
#[derive(Debug)]
pub struct Shards {
    shards: Vec<Scheduler>,
    /// Where requests are; of several shards alone.
    homes: BTreeMap<RequestId, Home>,
    /// Tokens to compute of requests that have not started, per shard.
    owed: Vec<u64>,
    incarnation: Option<Incarnation>,
    launched: StepSeq,
    /// Launched and not retired, oldest first.
    flights: VecDeque<Flight>,
    spare: Vec<Flight>,
    /// The shard that gets what suits all alike.
    turn: usize,
    placements: VecDeque<Placement>,
    /// What the group itself has to say.
    said: VecDeque<Output>,
    /// Those with a seat that the last plan left out, of several shards.
    stalls: Vec<(RequestId, Waits)>,
    steps: u64,
}

#[derive(Clone, Copy, Debug)]
struct Home {
    shard: usize,
    owes: u64,
}

/// A step of the group.
#[derive(Debug, Default)]
struct Flight {
    seq: StepSeq,
    /// Its number in each shard that takes part.
    of: Vec<Option<StepSeq>>,
}

impl Shards {
    /// Schedulers of `shards` shards, each under the limits of `config`; what may wait, waits in all of
    /// them together.
    ///
    /// # Errors
    /// When the limits contradict each other, or there is no shard.
    pub fn new(config: &Config, shards: u32) -> Result<Self, ConfigError> {
        if shards == 0 {
            return Err(ConfigError { field: "shards", allowed: "at least 1", got: 0 });
        }
        let made = (0..shards).map(|_| Scheduler::new(config.clone()));
        Ok(Self {
            shards: made.collect::<Result<_, _>>()?,
            homes: BTreeMap::new(),
            owed: vec![0; shards as usize],
            incarnation: None,
            launched: StepSeq::ZERO,
            flights: VecDeque::new(),
            spare: Vec::new(),
            turn: 0,
            placements: VecDeque::new(),
            said: VecDeque::new(),
            stalls: Vec::new(),
            steps: 0,
        })
    }

    /// The schedulers, in the order of their shards.
    #[must_use]
    pub fn schedulers(&self) -> &[Scheduler] {
        &self.shards
    }

    /// Takes an event. What is about one request goes to its shard, all else to every shard; outcomes
    /// come through [`Shards::retire`], where there are several.
    pub fn handle(&mut self, now: Timestamp, event: Event) {
        if let [only] = self.shards.as_mut_slice() {
            return only.handle(now, event);
        }
        match event {
            Event::Submit(submit) => self.submit(now, submit),
            Event::Abort(request) | Event::ForcePreempt(request) | Event::Stop { request, .. } => {
                // One that nobody knows is refused and counted by whoever is asked.
                let home = self.homes.get(&request).map_or(0, |home| home.shard);
                self.shards[home].handle(now, event);
            }
            Event::Outcome(outcome) => {
                let Outcome { seq, incarnation, .. } = outcome;
                self.retire(now, Joined { seq, incarnation, outcomes: vec![outcome] });
            }
            Event::WorkerReady(ready) => {
                self.incarnation = Some(ready.incarnation);
                self.launched = StepSeq::ZERO;
                self.flights.clear();
                for shard in &mut self.shards {
                    shard.handle(now, Event::WorkerReady(ready.clone()));
                }
            }
            Event::WorkerLost(incarnation) => {
                if self.incarnation == Some(incarnation) {
                    self.incarnation = None;
                    self.flights.clear();
                }
                for shard in &mut self.shards {
                    shard.handle(now, Event::WorkerLost(incarnation));
                }
            }
            Event::Wakeup => {
                for shard in &mut self.shards {
                    shard.handle(now, Event::Wakeup);
                }
            }
        }
    }

    fn submit(&mut self, now: Timestamp, submit: Box<Submit>) {
        let request = submit.request;
        if let Some(home) = self.homes.get(&request) {
            return self.shards[home.shard].handle(now, Event::Submit(submit));
        }
        if let Some(reason) = self.crowded(&submit) {
            self.said.push_back(Output::Refused { request, reason });
            return;
        }
        let prompt = Tokens(count(submit.prompt.len()));
        let weighed = self.shards.iter().zip(&self.owed);
        let weighed = weighed.map(|(shard, owed)| shard.weigh(&submit, *owed)).collect();
        let placement = Placement::choose(request, prompt, weighed, self.turn);
        let (shard, owes) = (placement.shard.index(), placement.uncached());
        self.turn = (shard + 1) % self.shards.len();
        self.homes.insert(request, Home { shard, owes });
        self.owed[shard] += owes;
        self.placements.push_back(placement);
        self.shards[shard].handle(now, Event::Submit(submit));
    }

    /// Whether more wait in all shards together than may.
    fn crowded(&self, submit: &Submit) -> Option<Refusal> {
        let config = self.shards.first()?.config();
        let wait = self.shards.iter().map(Scheduler::queue_lasts).max().unwrap_or_default();
        let waiting: u32 = self.shards.iter().map(|shard| shard.line.len().1).sum();
        if waiting >= config.queue_requests {
            return Some(Refusal::QueueFull { waiting, limit: config.queue_requests, wait });
        }
        let waiting: u64 = self.shards.iter().map(|shard| shard.line.len().2).sum();
        let (prompt, limit) = (Tokens(count(submit.prompt.len())), config.queue_tokens);
        let full = waiting + u64::from(prompt.0) > limit;
        full.then_some(Refusal::QueueTokens { waiting, prompt, limit, wait })
    }

    /// Takes the result of a step: the outcome of every shard, in their order.
    pub fn retire(&mut self, now: Timestamp, mut joined: Joined) {
        if let [only] = self.shards.as_mut_slice() {
            if let Some(outcome) = joined.outcomes.pop() {
                only.handle(now, Event::Outcome(outcome));
            }
            return;
        }
        let unfit = if self.incarnation != Some(joined.incarnation) {
            Some(Unfit::StaleIncarnation)
        } else if joined.outcomes.len() != self.shards.len() {
            Some(Unfit::Contradiction)
        } else {
            match self.flights.front() {
                Some(flight) if joined.seq == flight.seq => None,
                Some(flight) if joined.seq < flight.seq => Some(Unfit::RepeatedOutcome),
                Some(_) if joined.seq <= self.launched => Some(Unfit::EarlyOutcome),
                Some(_) | None => Some(Unfit::UnknownStep),
            }
        };
        if let Some(unfit) = unfit {
            return self.shards[0].refuse(unfit);
        }
        let Some(flight) = self.flights.pop_front() else { return };
        for ((shard, of), mut outcome) in
            self.shards.iter_mut().zip(&flight.of).zip(joined.outcomes)
        {
            match of {
                Some(own) => {
                    outcome.seq = *own;
                    shard.handle(now, Event::Outcome(outcome));
                }
                None if outcome.sampled.is_empty() => {}
                None => {
                    let (incarnation, seq) = (joined.incarnation, joined.seq);
                    let reason = WorkerFault::Contradiction { seq };
                    self.said.push_back(Output::RestartWorker { incarnation, reason });
                }
            }
        }
        self.spare.push(flight);
    }

    /// The next step of the group, or `None` when nothing can run or enough steps are in flight. Send
    /// every output polled before it first.
    pub fn plan_step(&mut self, now: Timestamp) -> Option<Planned> {
        if let [only] = self.shards.as_mut_slice() {
            return only.plan_step(now);
        }
        let depth = self.shards.first()?.config().depth;
        if count(self.flights.len()) > depth || !self.shards.iter().all(Scheduler::may_plan) {
            // The outcome that comes first is followed by another attempt.
            self.shards.iter_mut().for_each(|shard| shard.replan = false);
            return None;
        }
        beside::arrange(&mut self.shards);
        let mut flight = self.spare.pop().unwrap_or_default();
        flight.of.clear();
        let mut whole: Option<Planned> = None;
        let mut sections = Vec::with_capacity(self.shards.len());
        let mut shard_tokens = Vec::with_capacity(self.shards.len());
        for shard in &mut self.shards {
            let planned = shard.plan_step(now);
            flight.of.push(planned.as_ref().map(|planned| planned.plan.seq));
            let Some(Planned { mut plan, report }) = planned else {
                sections.push(Section::default());
                shard_tokens.push(Tokens::ZERO);
                continue;
            };
            sections.append(&mut plan.sections);
            shard_tokens.append(&mut plan.shard_tokens);
            whole = Some(match whole {
                None => Planned { plan, report },
                Some(others) => beside_each_other(others, &plan, &report),
            });
        }
        self.stalls.clear();
        for shard in &self.shards {
            self.stalls.extend_from_slice(shard.stalls());
        }
        let Some(Planned { plan, report }) = whole else {
            self.spare.push(flight);
            return None;
        };
        for ((shard, section), of) in self.shards.iter_mut().zip(&mut sections).zip(&flight.of) {
            if of.is_none() {
                *section = shard.stand_still();
            }
        }
        let ahead = count(self.flights.len());
        let seq = self.launched.next();
        self.launched = seq;
        flight.seq = seq;
        self.flights.push_back(flight);
        self.steps += 1;
        Some(Planned {
            plan: StepPlan { seq, sections, shard_tokens, ..plan },
            report: PlanReport { seq, ahead, ..report },
        })
    }

    /// Takes a plan back, as [`Scheduler::recycle`] does.
    pub fn recycle(&mut self, plan: StepPlan) {
        if let [only] = self.shards.as_mut_slice() {
            only.recycle(plan);
        }
    }

    /// The next thing said, and for which shard's workers it is, where it is for workers.
    pub fn poll_output(&mut self) -> Option<(ShardId, Output)> {
        let several = self.shards.len() > 1;
        if let Some(output) = self.said.pop_front() {
            return Some((ShardId(0), output));
        }
        let found = self.shards.iter_mut().enumerate().find_map(|(at, shard)| {
            let output = shard.poll_output()?;
            Some((at, output))
        });
        let (at, mut output) = found?;
        if several {
            self.note(at, &mut output);
        }
        Some((ShardId(u16::try_from(at).unwrap_or(u16::MAX)), output))
    }

    /// Keeps the books of who is where; a step that a shard names is named as the group counts.
    fn note(&mut self, shard: usize, output: &mut Output) {
        match output {
            Output::Started { request, .. } => {
                if let Some(home) = self.homes.get_mut(request) {
                    self.owed[home.shard] -= core::mem::take(&mut home.owes);
                }
            }
            Output::Finished { request, .. } | Output::Refused { request, .. } => {
                if let Some(home) = self.homes.remove(request) {
                    self.owed[home.shard] -= home.owes;
                }
            }
            Output::RestartWorker { reason, .. } => {
                let (WorkerFault::Overdue { seq, .. } | WorkerFault::Contradiction { seq }) =
                    reason;
                let mut flights = self.flights.iter();
                if let Some(flight) = flights.find(|flight| flight.of[shard] == Some(*seq)) {
                    *seq = flight.seq;
                }
            }
            Output::Upload(_)
            | Output::Forget(..)
            | Output::Token { .. }
            | Output::PromptLogprobs(_) => {}
        }
    }

    /// Where requests were placed since the last call, and why; nothing where there is one shard.
    pub fn poll_placement(&mut self) -> Option<Placement> {
        self.placements.pop_front()
    }

    /// When to send [`Event::Wakeup`] and plan again if nothing else happens before.
    #[must_use]
    pub fn next_wakeup(&self) -> Option<Timestamp> {
        self.shards.iter().filter_map(Scheduler::next_wakeup).min()
    }

    /// Figures for metrics, of all shards together.
    #[must_use]
    pub fn gauges(&self) -> Gauges {
        if let [only] = self.shards.as_slice() {
            return only.gauges();
        }
        let mut all = Gauges::default();
        for shard in &self.shards {
            sum::gauges(&mut all, &shard.gauges());
        }
        all.cache_usage /= self.shards.len() as f64;
        all.steps = self.steps;
        all
    }

    /// Those with a seat that the last plan left out, and what each waits for.
    #[must_use]
    pub fn stalls(&self) -> &[(RequestId, Waits)] {
        if let [only] = self.shards.as_slice() { only.stalls() } else { &self.stalls }
    }

    /// Every request that the last plan did not run, and what it waits for.
    #[must_use]
    pub fn explain(&self) -> Vec<(RequestId, Waits)> {
        self.shards.iter().flat_map(Scheduler::explain).collect()
    }
}

/// One plan and one report of what two shards do in a step.
fn beside_each_other(mut whole: Planned, plan: &StepPlan, report: &PlanReport) -> Planned {
    whole.plan.bucket = whole.plan.bucket.max(plan.bucket);
    sum::reports(&mut whole.report, report);
    whole
}
