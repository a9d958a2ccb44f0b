//! The data-parallel shards of one worker group: a [`Scheduler`] each, in lockstep.
//!
//! A step is one plan with a section per shard, so shards are planned together: when every one of them
//! may plan, and as one step for all of them; a shard without work is in it and stands still. Each
//! shard numbers its own steps; the numbers that workers see are the group's. Where a request runs is
//! decided when it is submitted (`place`) and kept, also when the group dies; what waits, waits in one queue.
//! With one shard everything is passed through. Invariants: no shard is ever a step ahead of another; a
//! result is taken by all shards or by none; a request that must run alone has no other beside it in any
//! shard.

mod beside;
mod join;
mod place;
mod sum;

pub(crate) use beside::Beside;
pub use join::{Divergence, Join, Joined};
pub use place::{Placement, Weighed, Why};

use crate::config::{Config, ConfigError};
use crate::door::make_room;
use crate::event::{Event, Submit};
use crate::output::{Output, WorkerFault};
use crate::policy::bucket::bucket;
use crate::report::{Gauges, PlanReport, Planned, Unfit, Waits};
use crate::scheduler::{Scheduler, count};
use crate::spare::Shells;
use ids::{Incarnation, RequestId, ShardId, StepSeq, Timestamp, Tokens};
use std::collections::VecDeque;
use step::{Outcome, Section, StepPlan};

/// The schedulers of a group.
#[derive(Debug)]
pub struct Shards {
    shards: Vec<Scheduler>,
    incarnation: Option<Incarnation>,
    launched: StepSeq,
    /// Launched and not retired, oldest first.
    flights: VecDeque<Flight>,
    /// When the oldest step in flight could start.
    head_since: Timestamp,
    /// Said once that the group must be restarted.
    condemned: bool,
    spare: Vec<Flight>,
    shells: Shells,
    submitted: u64,
    /// The shard that gets what suits all alike.
    turn: usize,
    placements: VecDeque<Placement>,
    /// What the group itself has to say.
    said: VecDeque<Output>,
    /// Those with a seat that the last plan left out, of several shards.
    stalls: Vec<(RequestId, Waits)>,
    steps: u64,
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
            incarnation: None,
            launched: StepSeq::ZERO,
            flights: VecDeque::new(),
            head_since: Timestamp::ZERO,
            condemned: false,
            spare: Vec::new(),
            shells: Shells::default(),
            submitted: 0,
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
                let home = self.home(request).unwrap_or(0);
                self.shards[home].handle(now, event);
            }
            Event::Outcome(outcome) => {
                let Outcome { seq, incarnation, .. } = outcome;
                self.retire(now, Joined { seq, incarnation, outcomes: vec![outcome] });
            }
            Event::WorkerReady(ready) => {
                let newest = self.shards[0].newest;
                if newest.is_none_or(|newest| ready.incarnation > newest) {
                    self.incarnation = Some(ready.incarnation);
                    self.launched = StepSeq::ZERO;
                    self.condemned = false;
                    self.flights.clear();
                }
                for shard in &mut self.shards {
                    shard.handle(now, Event::WorkerReady(ready.clone()));
                }
            }
            Event::WorkerLost(incarnation) => {
                if self.incarnation == Some(incarnation) {
                    self.incarnation = None;
                    self.condemned = false;
                    self.flights.clear();
                }
                for shard in &mut self.shards {
                    shard.handle(now, Event::WorkerLost(incarnation));
                }
            }
            Event::Wakeup => {
                self.shards.iter_mut().for_each(|shard| shard.expire(now));
                if let Some((at, seq)) = self.overdue_at()
                    && at <= now
                {
                    let waited = now.since(self.head_since);
                    self.condemn(WorkerFault::Overdue { seq, waited });
                }
            }
        }
    }

    /// The shard of a request that is not over.
    fn home(&self, request: RequestId) -> Option<usize> {
        self.shards.iter().position(|shard| shard.ids.contains_key(&request))
    }

    fn submit(&mut self, now: Timestamp, submit: Box<Submit>) {
        let request = submit.request;
        if let Some(home) = self.home(request) {
            return self.shards[home].handle(now, Event::Submit(submit));
        }
        // Who is late holds no place, in no shard.
        self.shards.iter_mut().for_each(|shard| shard.expire(now));
        let fits = self.shards[0].acceptable(now, &submit);
        if let Err(reason) = fits.and_then(|()| make_room(&mut self.shards, &submit)) {
            self.said.push_back(Output::Refused { request, reason });
            return;
        }
        let prompt = Tokens(count(submit.prompt.len()));
        let weighed = self.shards.iter().map(|shard| shard.weigh(&submit)).collect();
        let placement = Placement::choose(request, prompt, weighed, self.turn);
        let (shard, owes) = (placement.shard.index(), placement.uncached());
        self.turn = (shard + 1) % self.shards.len();
        self.placements.push_back(placement);
        // Order of arrival is one order over all shards.
        let shard = &mut self.shards[shard];
        shard.submitted = self.submitted;
        self.submitted += 1;
        if let Err(unfit) = shard.submit(now, *submit, owes) {
            shard.refuse(unfit);
        }
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
        // A step is taken whole or refused whole.
        if self.condemned || !self.is_answered_by(&joined) {
            self.condemn(WorkerFault::Contradiction { seq: joined.seq });
            return self.shards[0].refuse(Unfit::Contradiction);
        }
        let Some(flight) = self.flights.pop_front() else { return };
        self.head_since = now;
        for ((shard, own), mut outcome) in
            self.shards.iter_mut().zip(&flight.of).zip(joined.outcomes)
        {
            if let Some(own) = own {
                outcome.seq = *own;
                shard.handle(now, Event::Outcome(outcome));
            }
        }
        self.spare.push(flight);
    }

    /// Whether every shard says what the oldest step asked it for, and one that stood still nothing.
    fn is_answered_by(&mut self, joined: &Joined) -> bool {
        let Some(flight) = self.flights.front() else { return false };
        let mut shards = self.shards.iter_mut().zip(&flight.of).zip(&joined.outcomes);
        shards.all(|((shard, own), outcome)| match own {
            Some(_) => shard.is_answered_by(outcome),
            None => outcome.sampled.is_empty(),
        })
    }

    /// When the oldest step in flight counts as hung, and which it is: shards run it together, so the one
    /// that may take longest says when.
    fn overdue_at(&self) -> Option<(Timestamp, StepSeq)> {
        let flight = self.flights.front().filter(|_| !self.condemned)?;
        let running = self.shards.iter().zip(&flight.of).filter(|(_, own)| own.is_some());
        let allowed =
            running.filter_map(|(shard, _)| shard.allowance()).map(|(allowed, _)| allowed);
        Some((self.head_since.after(allowed.max()?), flight.seq))
    }

    fn condemn(&mut self, reason: WorkerFault) {
        if let Some(incarnation) = self.incarnation.filter(|_| !self.condemned) {
            self.condemned = true;
            self.said.push_back(Output::RestartWorker { incarnation, reason });
        }
    }

    /// The next step of the group, or `None` when nothing can run or enough steps are in flight. Send
    /// every output polled before it first.
    pub fn plan_step(&mut self, now: Timestamp) -> Option<Planned> {
        if let [only] = self.shards.as_mut_slice() {
            return only.plan_step(now);
        }
        let depth = self.shards.first()?.config().depth;
        let room = count(self.flights.len()) <= depth && !self.condemned;
        if !room || !self.shards.iter().all(Scheduler::may_plan) {
            // The outcome that comes first is followed by another attempt.
            self.shards.iter_mut().for_each(|shard| shard.replan = false);
            return None;
        }
        let mut flight = self.spare.pop().unwrap_or_default();
        flight.of.clear();
        let (mut shard_tokens, mut sections) = self.shells.take();
        let mut whole: Option<(Incarnation, PlanReport)> = None;
        let mut group = beside::Group::of(&self.shards);
        for (at, shard) in self.shards.iter_mut().enumerate() {
            group.arrange(at, shard);
            let part = shard.plan_part(now);
            group.planned(at, shard);
            flight.of.push(part.as_ref().map(|part| part.seq));
            let Some(part) = part else {
                sections.push(Section::default());
                shard_tokens.push(Tokens::ZERO);
                continue;
            };
            sections.push(part.section);
            shard_tokens.push(part.tokens);
            match &mut whole {
                None => whole = Some((part.incarnation, part.report)),
                Some((_, report)) => sum::reports(report, &part.report),
            }
        }
        self.stalls.clear();
        for shard in &self.shards {
            self.stalls.extend_from_slice(shard.stalls());
        }
        let most = shard_tokens.iter().max().copied().unwrap_or_default();
        let mut plan = StepPlan {
            seq: self.launched.next(),
            incarnation: Incarnation(0),
            bucket: bucket(most),
            shard_tokens,
            sections,
        };
        let Some((incarnation, report)) = whole else {
            self.shells.take_back(plan);
            self.spare.push(flight);
            return None;
        };
        plan.incarnation = incarnation;
        for ((shard, section), of) in self.shards.iter_mut().zip(&mut plan.sections).zip(&flight.of)
        {
            if of.is_none() {
                *section = shard.stand_still();
            }
        }
        let (seq, ahead) = (plan.seq, count(self.flights.len()));
        if ahead == 0 {
            self.head_since = now;
        }
        self.launched = seq;
        flight.seq = seq;
        self.flights.push_back(flight);
        self.steps += 1;
        Some(Planned { plan, report: PlanReport { seq, ahead, ..report } })
    }

    /// Takes a plan back, as [`Scheduler::recycle`] does.
    pub fn recycle(&mut self, mut plan: StepPlan) {
        if let [only] = self.shards.as_mut_slice() {
            return only.recycle(plan);
        }
        for (shard, section) in self.shards.iter_mut().zip(plan.sections.drain(..)) {
            shard.spare.take_back(section);
        }
        self.shells.take_back(plan);
    }

    /// The next thing said, and for which shard's workers it is, where it is for workers.
    pub fn poll_output(&mut self) -> Option<(ShardId, Output)> {
        if let Some(output) = self.said.pop_front() {
            return Some((ShardId(0), output));
        }
        let found = self.shards.iter_mut().enumerate().find_map(|(at, shard)| {
            let output = shard.poll_output()?;
            Some((at, output))
        });
        let (at, output) = found?;
        Some((ShardId(u16::try_from(at).unwrap_or(u16::MAX)), output))
    }

    /// Where requests were placed since the last call, and why; nothing where there is one shard.
    pub fn poll_placement(&mut self) -> Option<Placement> {
        self.placements.pop_front()
    }

    /// When to send [`Event::Wakeup`] and plan again if nothing else happens before.
    #[must_use]
    pub fn next_wakeup(&self) -> Option<Timestamp> {
        if let [only] = self.shards.as_slice() {
            return only.next_wakeup();
        }
        let overdue = self.overdue_at().map(|(at, _)| at);
        self.shards.iter().filter_map(Scheduler::alarm).chain(overdue).min()
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
