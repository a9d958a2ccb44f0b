//! A group of shards, said in the most obvious way: a model for each, asked one after the other.
//!
//! With one shard it adds nothing. Invariant: a step is one for all shards, and whoever must run alone
//! has nobody beside it in any of them.

use super::plan::padded;
use super::{Beside, Naive, Phase};
use ids::{Incarnation, RequestId, StepSeq, Timestamp, Tokens};
use scheduler::{Config, Event, Joined, Output, Placement, Refusal, Unfit, WorkerFault};
use std::collections::VecDeque;
use step::{Outcome, Section, StepPlan};

/// The models of a group.
#[derive(Debug)]
pub struct Group {
    pub(super) config: Config,
    pub(super) shards: Vec<Naive>,
    /// Who was put where, and what of the prompt was not cached there then.
    pub(super) owed: Vec<(RequestId, usize, u64)>,
    pub(super) turn: usize,
    pub(super) submitted: u64,
    pub(super) placements: VecDeque<Placement>,
    incarnation: Option<Incarnation>,
    /// Steps of this life, and how each shard counts those that it takes part in.
    steps: Vec<Vec<Option<u64>>>,
    /// How many of them are over.
    over: usize,
    /// Since when the first that is not could run.
    since: Timestamp,
    condemned: bool,
    /// What the group says itself.
    said: VecDeque<Output>,
}

impl Group {
    /// So many models without workers.
    #[must_use]
    pub fn new(config: &Config, shards: u32) -> Self {
        Self {
            config: config.clone(),
            shards: (0..shards).map(|_| Naive::new(config.clone())).collect(),
            owed: Vec::new(),
            turn: 0,
            submitted: 0,
            placements: VecDeque::new(),
            incarnation: None,
            steps: Vec::new(),
            over: 0,
            since: Timestamp::ZERO,
            condemned: false,
            said: VecDeque::new(),
        }
    }

    /// The models.
    #[must_use]
    pub fn shards(&self) -> &[Naive] {
        &self.shards
    }

    /// Takes an event; says whatever of it did not fit.
    pub fn handle(&mut self, now: Timestamp, event: &Event) -> Vec<Unfit> {
        match event {
            Event::Submit(submit) => self.submit(now, submit).err().into_iter().collect(),
            Event::Abort(request) | Event::ForcePreempt(request) | Event::Stop { request, .. } => {
                let home = self.home(*request).unwrap_or(0);
                self.shards[home].handle(now, event).into_iter().collect()
            }
            Event::WorkerReady(ready) => {
                self.forget_steps();
                self.incarnation = Some(ready.incarnation);
                self.tell_all(now, event)
            }
            Event::WorkerLost(incarnation) => {
                if self.incarnation == Some(*incarnation) {
                    self.incarnation = None;
                    self.forget_steps();
                }
                self.tell_all(now, event)
            }
            Event::Wakeup if self.shards.len() > 1 => {
                self.shards.iter_mut().for_each(|shard| shard.expire(now));
                if self.overdue(now) {
                    let (seq, waited) = (StepSeq(self.over as u64 + 1), now.since(self.since));
                    self.condemn(WorkerFault::Overdue { seq, waited });
                }
                Vec::new()
            }
            Event::Outcome(_) | Event::Wakeup => self.tell_all(now, event),
        }
    }

    fn tell_all(&mut self, now: Timestamp, event: &Event) -> Vec<Unfit> {
        self.shards.iter_mut().filter_map(|shard| shard.handle(now, event)).collect()
    }

    fn forget_steps(&mut self) {
        self.condemned = false;
        self.steps.clear();
        self.over = 0;
    }

    /// What of a result is each shard's, as it counts; nothing for one that stood still.
    ///
    /// # Errors
    /// When the group is not waiting for it, or a shard did not say what it was asked for.
    pub fn parts(&self, joined: &Joined) -> Result<Vec<Option<Outcome>>, Unfit> {
        if let ([only], [outcome]) = (self.shards.as_slice(), joined.outcomes.as_slice()) {
            return only.judge(outcome).map(|()| vec![Some(outcome.clone())]);
        }
        let (seq, over) = (joined.seq.0 as usize, self.over);
        if self.incarnation != Some(joined.incarnation) {
            return Err(Unfit::StaleIncarnation);
        }
        if seq > self.steps.len() {
            return Err(Unfit::UnknownStep);
        }
        if seq != over + 1 {
            return Err(if seq > over { Unfit::EarlyOutcome } else { Unfit::RepeatedOutcome });
        }
        let mut parts = Vec::new();
        for ((shard, own), outcome) in
            self.shards.iter().zip(&self.steps[over]).zip(&joined.outcomes)
        {
            let part = own.map(|own| Outcome { seq: StepSeq(own), ..outcome.clone() });
            match &part {
                Some(part) => shard.judge(part)?,
                None if outcome.sampled.is_empty() => {}
                None => return Err(Unfit::Contradiction),
            }
            parts.push(part);
        }
        if self.condemned { Err(Unfit::Contradiction) } else { Ok(parts) }
    }

    /// Takes the result of a step; says why not where it does not fit.
    pub fn retire(&mut self, now: Timestamp, joined: &Joined) -> Option<Unfit> {
        if let ([only], [outcome]) = (self.shards.as_mut_slice(), joined.outcomes.as_slice()) {
            return only.handle(now, &Event::Outcome(outcome.clone()));
        }
        let parts = match self.parts(joined) {
            Ok(parts) => parts,
            Err(unfit) => {
                if unfit == Unfit::Contradiction {
                    self.condemn(WorkerFault::Contradiction { seq: joined.seq });
                }
                return Some(unfit);
            }
        };
        self.over += 1;
        self.since = now;
        for (shard, part) in self.shards.iter_mut().zip(parts) {
            let unfit = part.and_then(|part| shard.handle(now, &Event::Outcome(part)));
            debug_assert_eq!(unfit, None, "it was judged");
        }
        None
    }

    /// When the first step that is not over counts as hung: its shards run it together, so the one that
    /// may take longest says when.
    fn overdue_at(&self) -> Option<Timestamp> {
        let step = self.steps.get(self.over).filter(|_| !self.condemned)?;
        let there = self.shards.iter().zip(step).filter(|(_, own)| own.is_some());
        let allowed = there.filter_map(|(shard, _)| shard.allowance()).max()?;
        Some(self.since.after(allowed))
    }

    /// Whether an event now would give the workers up for lost.
    #[must_use]
    pub fn overdue(&self, now: Timestamp) -> bool {
        match self.shards.as_slice() {
            [only] => only.overdue(now),
            _ => self.overdue_at().is_some_and(|at| at <= now),
        }
    }

    fn condemn(&mut self, reason: WorkerFault) {
        if let Some(incarnation) = self.incarnation.filter(|_| !self.condemned) {
            self.condemned = true;
            self.said.push_back(Output::RestartWorker { incarnation, reason });
        }
    }

    /// The next step, or none.
    pub fn plan_step(&mut self, now: Timestamp) -> Option<StepPlan> {
        if let [only] = self.shards.as_mut_slice() {
            return only.plan_step(now);
        }
        let under_way = self.steps.len() - self.over;
        let room = under_way <= self.config.depth as usize && !self.condemned;
        if !room || !self.shards.iter().all(Naive::may_plan) {
            self.shards.iter_mut().for_each(|shard| shard.replan = false);
            return None;
        }
        let mut alone = self.shards.iter().position(Naive::runs_alone);
        alone = alone.or_else(|| self.shards.iter().position(Naive::waits_alone));
        let mut plans = Vec::new();
        for at in 0..self.shards.len() {
            let mut others = (0..).zip(&self.shards).filter(|(other, _)| *other != at);
            let running = others.any(|(_, shard)| !shard.running().is_empty());
            let shard = &mut self.shards[at];
            shard.beside = Beside { running, barred: alone.is_some_and(|alone| alone != at) };
            plans.push(shard.plan_step(now));
            if shard.runs_alone() {
                alone = Some(at);
            }
        }
        let incarnation = plans.iter().flatten().next()?.incarnation;
        if under_way == 0 {
            self.since = now;
        }
        self.steps.push(plans.iter().map(|plan| Some(plan.as_ref()?.seq.0)).collect());
        let tokens = |plan: &Option<StepPlan>| {
            plan.iter().flat_map(|plan| &plan.shard_tokens).copied().sum::<Tokens>()
        };
        let shard_tokens: Vec<Tokens> = plans.iter().map(tokens).collect();
        let most = shard_tokens.iter().map(|tokens| tokens.0).max().unwrap_or(0);
        let own = |(plan, shard): (Option<StepPlan>, &mut Naive)| -> Section {
            let own = plan.and_then(|mut plan| plan.sections.pop());
            own.unwrap_or_else(|| shard.stand_still())
        };
        Some(StepPlan {
            seq: StepSeq(self.steps.len() as u64),
            incarnation,
            bucket: Tokens(padded(most)),
            shard_tokens,
            sections: plans.into_iter().zip(&mut self.shards).map(own).collect(),
        })
    }

    /// The next thing said, and by which shard.
    pub fn poll_output(&mut self) -> Option<(usize, Output)> {
        if let Some(output) = self.said.pop_front() {
            return Some((0, output));
        }
        let mut each = self.shards.iter_mut().enumerate();
        each.find_map(|(at, shard)| Some((at, shard.poll_output()?)))
    }

    /// Who was put where since the last call.
    pub fn poll_placement(&mut self) -> Option<Placement> {
        self.placements.pop_front()
    }

    pub(super) fn refuse(&mut self, request: RequestId, reason: Refusal) {
        let output = Output::Refused { request, reason };
        match self.shards.as_mut_slice() {
            [only] => _ = only.say(output),
            _ => self.said.push_back(output),
        }
    }

    /// When something happens by itself.
    #[must_use]
    pub fn next_wakeup(&self) -> Option<Timestamp> {
        match self.shards.as_slice() {
            [only] => only.next_wakeup(),
            all => all.iter().filter_map(Naive::alarm).chain(self.overdue_at()).min(),
        }
    }

    pub(super) fn home(&self, request: RequestId) -> Option<usize> {
        self.shards.iter().position(|shard| shard.phase(request) != Phase::Absent)
    }

    /// What a request is doing.
    #[must_use]
    pub fn phase(&self, request: RequestId) -> Phase {
        self.home(request).map_or(Phase::Absent, |home| self.shards[home].phase(request))
    }

    /// Everybody who is in a phase, shard by shard.
    #[must_use]
    pub fn in_phase(&self, phase: Phase) -> Vec<RequestId> {
        self.shards.iter().flat_map(|shard| shard.in_phase(phase)).collect()
    }
}
