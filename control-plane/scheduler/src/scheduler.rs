//! The scheduler's data and its front door: which event goes where, and what each state makes of
//! what clients do.
//!
//! Planning, outcomes and the worker's comings and goings have files of their own.
//! Invariant: an event that does not fit changes nothing but a counter.

use crate::admit::Blocked;
use crate::config::{Config, ConfigError};
use crate::door::make_room;
use crate::event::{Event, Submit};
use crate::job::Job;
use crate::life::Life;
use crate::line::Line;
use crate::output::{FinishReason, Outbox, Output, Refusal};
use crate::plan::Part;
use crate::policy::bucket::bucket;
use crate::policy::cost::CostModel;
use crate::policy::outlook::Outlook;
use crate::report::{Gauges, Planned, Unfit, Waits};
use crate::request::{Live, Request};
use crate::shards::Beside;
use crate::slab::{Key, Slab};
use crate::spare::Spare;
use crate::tables::peak;
use core::slice;
use ids::{Incarnation, RequestId, Timestamp, Tokens};
use std::collections::{BTreeMap, BTreeSet};
use step::StepPlan;

/// Decides what every step of one data-parallel shard does.
#[derive(Debug)]
pub struct Scheduler {
    pub(crate) config: Config,
    pub(crate) life: Option<Life>,
    /// The newest life ever begun.
    pub(crate) newest: Option<Incarnation>,
    pub(crate) requests: Slab<Live>,
    pub(crate) ids: BTreeMap<RequestId, Key>,
    /// Requests without a seat.
    pub(crate) line: Line,
    pub(crate) deadlines: BTreeSet<(Timestamp, Key)>,
    pub(crate) outbox: Outbox,
    pub(crate) cost: CostModel,
    pub(crate) outlook: Outlook,
    pub(crate) counters: Gauges,
    pub(crate) submitted: u64,
    /// What the first in line waits for, and running requests that the last plan left out.
    pub(crate) head: Option<(RequestId, Waits)>,
    pub(crate) stalls: Vec<(RequestId, Waits)>,
    /// What the first in line was last short of.
    pub(crate) blocked: Option<Blocked>,
    pub(crate) spare: Spare,
    /// Set when planning changed something that another attempt may use once outputs have left.
    pub(crate) replan: bool,
    /// The other shards of the group.
    pub(crate) beside: Beside,
}

/// What a client or the clock does to one request.
#[derive(Clone, Copy, Debug)]
enum Move {
    Abort,
    Stop(Tokens),
    Expire,
    Preempt,
}

/// What comes of a move.
enum Act {
    /// The request ends where it waits.
    Finish(FinishReason),
    /// The request ends in its seat.
    Close(FinishReason),
    /// The request goes back in line.
    Preempt,
    Refuse,
}

impl Scheduler {
    /// A scheduler without a worker.
    ///
    /// # Errors
    /// When the limits contradict each other.
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        config.check()?;
        Ok(Self {
            line: Line::new(&config),
            config,
            life: None,
            newest: None,
            requests: Slab::default(),
            ids: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            outbox: Outbox::default(),
            cost: CostModel::default(),
            outlook: Outlook::default(),
            counters: Gauges::default(),
            submitted: 0,
            head: None,
            stalls: Vec::new(),
            blocked: None,
            spare: Spare::default(),
            replan: false,
            beside: Beside::default(),
        })
    }

    /// Takes an event. One that does not fit is refused and counted in [`Gauges::refused`].
    pub fn handle(&mut self, now: Timestamp, event: Event) {
        self.expire(now);
        let taken = match event {
            Event::Submit(submit) => {
                let owes = submit.prompt.len() as u64;
                self.submit(now, *submit, owes)
            }
            Event::Abort(request) => self.move_request(request, Move::Abort),
            Event::Stop { request, keep } => self.move_request(request, Move::Stop(keep)),
            Event::ForcePreempt(request) => self.move_request(request, Move::Preempt),
            Event::Outcome(outcome) => self.with_life(|s, life| s.on_outcome(life, now, outcome)),
            Event::WorkerReady(ready) => self.on_ready(now, &ready),
            Event::WorkerLost(incarnation) => self.on_lost(incarnation),
            Event::Wakeup => {
                self.condemn_overdue(now);
                Ok(())
            }
        };
        if let Err(unfit) = taken {
            self.refuse(unfit);
        }
    }

    /// The next step, or `None` when nothing can run or enough steps are in flight. Send every
    /// output polled before it first.
    pub fn plan_step(&mut self, now: Timestamp) -> Option<Planned> {
        let Part { seq, incarnation, tokens, section, report } = self.plan_part(now)?;
        let (mut shard_tokens, mut sections) = self.spare.shells.take();
        shard_tokens.push(tokens);
        sections.push(section);
        let bucket = bucket(tokens);
        let plan = StepPlan { seq, incarnation, bucket, shard_tokens, sections };
        Some(Planned { plan, report })
    }

    /// The same as a part of a step that other shards are in.
    pub(crate) fn plan_part(&mut self, now: Timestamp) -> Option<Part> {
        self.expire(now);
        self.replan = false;
        let mut life = self.life.take()?;
        let planned = self.plan(&mut life, now);
        self.life = Some(life);
        planned
    }

    /// Takes a plan back that has been sent, for what it is made of: a step in which nobody comes or
    /// goes then takes no memory. Whoever keeps its plans loses nothing but that.
    pub fn recycle(&mut self, mut plan: StepPlan) {
        plan.sections.drain(..).for_each(|section| self.spare.take_back(section));
        self.spare.shells.take_back(plan);
    }

    /// The next thing said.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outbox.poll()
    }

    /// When to send [`Event::Wakeup`] and plan again if nothing else happens before. A time in the
    /// past means at once, after the outputs have left.
    #[must_use]
    pub fn next_wakeup(&self) -> Option<Timestamp> {
        [self.alarm(), self.overdue_at().map(|(at, _)| at)].into_iter().flatten().min()
    }

    /// The same, whatever the worker does.
    pub(crate) fn alarm(&self) -> Option<Timestamp> {
        let deadline = self.deadlines.first().map(|(at, _)| *at);
        if self.replan { Some(Timestamp::ZERO) } else { deadline }
    }

    /// Figures for metrics.
    #[must_use]
    pub fn gauges(&self) -> Gauges {
        let (waiting, queued, queued_tokens) = self.line.len();
        let behind = self.life.as_ref().map(|life| life.cache.behind()).unwrap_or_default();
        Gauges {
            running: self.life.as_ref().map_or(0, |life| count(life.running.len())),
            waiting: count(waiting),
            queued,
            queued_tokens,
            cache_usage: self.life.as_ref().map_or(0.0, |life| life.cache.usage()),
            host_blocks: behind.0.0,
            host_room: behind.1.0,
            ..self.counters
        }
    }

    /// Every request that the last plan did not run, and what it waits for; running ones first.
    #[must_use]
    pub fn explain(&self) -> Vec<(RequestId, Waits)> {
        let mut all = self.stalls.clone();
        for (ahead, key) in self.line.in_order().into_iter().enumerate() {
            let Some(live) = self.requests.get(key) else { continue };
            let id = live.job().id;
            let waits = match self.head {
                _ if self.life.is_none() => Waits::Worker,
                Some((head, waits)) if head == id => waits,
                _ => Waits::Turn { ahead: count(ahead) },
            };
            all.push((id, waits));
        }
        all
    }

    /// Those with a seat that the last plan left out, and what each waits for.
    #[must_use]
    pub fn stalls(&self) -> &[(RequestId, Waits)] {
        &self.stalls
    }

    /// The first in line, and what the last attempt to plan found it to wait for.
    #[must_use]
    pub fn first_in_line(&self) -> Option<(RequestId, Waits)> {
        self.head
    }

    /// The cache of the present life, for tests and simulations.
    #[must_use]
    pub fn cache(&self) -> Option<&kv_cache::KvCache> {
        self.life.as_ref().map(|life| &life.cache)
    }

    /// The configuration it runs under.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    pub(crate) fn refuse(&mut self, unfit: Unfit) {
        self.counters.refused[unfit.index()] += 1;
    }

    /// Runs `f` on the present life.
    fn with_life(
        &mut self,
        f: impl FnOnce(&mut Self, &mut Life) -> Result<(), Unfit>,
    ) -> Result<(), Unfit> {
        let Some(mut life) = self.life.take() else { return Err(Unfit::StaleIncarnation) };
        let done = f(self, &mut life);
        self.life = Some(life);
        done
    }

    /// Takes a request of which so many tokens are expected to be computed first.
    pub(crate) fn submit(
        &mut self,
        now: Timestamp,
        submit: Submit,
        owes: u64,
    ) -> Result<(), Unfit> {
        let request = submit.request;
        if self.ids.contains_key(&request) {
            return Err(Unfit::DuplicateRequest);
        }
        let room =
            self.acceptable(now, &submit).and_then(|()| make_room(slice::from_mut(self), &submit));
        if let Err(reason) = room {
            self.outbox.say(Output::Refused { request, reason });
            return Ok(());
        }
        let flow = self.line.enter(submit.priority, submit.tenant);
        let job = Job::new(submit, flow, self.submitted);
        self.submitted += 1;
        let key = self.requests.insert(Live::Queued(Request::<crate::request::Queued>::new(job)));
        self.ids.insert(request, key);
        if let Some(live) = self.requests.get(key) {
            self.line.push(live.job(), key, owes);
        }
        match self.set_alarm(now, key) {
            Ok(()) => self.upload(key),
            Err(reason) => self.finish_waiting(key, FinishReason::Refused(reason)),
        }
        Ok(())
    }

    /// Whether a request can be run at all.
    pub(crate) fn acceptable(&self, now: Timestamp, submit: &Submit) -> Result<(), Refusal> {
        let config = &self.config;
        let max_context = config.max_context;
        let prompt = u32::try_from(submit.prompt.len()).map_or(Tokens(u32::MAX), Tokens);
        if prompt.is_zero() {
            return Err(Refusal::EmptyPrompt);
        }
        let max_tokens = submit.max_tokens;
        if u64::from(prompt.0) + u64::from(max_tokens.0) > u64::from(max_context.0) {
            return Err(Refusal::TooLong { prompt, max_tokens, max_context });
        }
        if submit.deadline.is_some_and(|at| at <= now) {
            return Err(Refusal::DeadlinePassed);
        }
        match &self.life {
            Some(life) => fits(life, Tokens(prompt.0 + max_tokens.0.max(1) - 1)),
            None => Ok(()),
        }
    }

    /// The matrix of states and moves. Every pair is named, so that a new state or move has to
    /// say what it means to the others.
    fn move_request(&mut self, request: RequestId, made: Move) -> Result<(), Unfit> {
        let key = *self.ids.get(&request).ok_or(Unfit::UnknownRequest)?;
        let live = self.requests.get_mut(key).ok_or(Unfit::UnknownRequest)?;
        if let Move::Stop(keep) = made {
            let streamed = live.job().output.len();
            if keep.as_usize() > streamed || streamed == 0 {
                return Err(Unfit::StopBeyondOutput);
            }
        }
        let act = match (&*live, made) {
            (Live::Queued(_), Move::Abort) => Act::Finish(FinishReason::Aborted),
            (Live::Queued(_), Move::Expire) => Act::Finish(FinishReason::Deadline),
            (Live::Queued(_), Move::Stop(_) | Move::Preempt) => Act::Refuse,
            (Live::Preempted(_), Move::Abort) => Act::Finish(FinishReason::Aborted),
            (Live::Preempted(_), Move::Expire) => Act::Finish(FinishReason::Deadline),
            (Live::Preempted(_), Move::Stop(_)) => Act::Finish(FinishReason::StopString),
            (Live::Preempted(_), Move::Preempt) => Act::Refuse,
            (Live::Prefilling(_) | Live::Decoding(_), Move::Abort) => {
                Act::Close(FinishReason::Aborted)
            }
            (Live::Prefilling(_) | Live::Decoding(_), Move::Expire) => {
                Act::Close(FinishReason::Deadline)
            }
            (Live::Prefilling(_) | Live::Decoding(_), Move::Stop(_)) => {
                Act::Close(FinishReason::StopString)
            }
            (Live::Prefilling(_) | Live::Decoding(_), Move::Preempt) => Act::Preempt,
            (Live::Closing(_), Move::Abort | Move::Stop(_) | Move::Expire | Move::Preempt) => {
                Act::Refuse
            }
        };
        if let (Move::Stop(keep), Act::Close(_) | Act::Finish(_)) = (made, &act) {
            live.job_mut().output.truncate(keep.as_usize());
        }
        match act {
            Act::Finish(reason) => {
                self.finish_waiting(key, reason);
                Ok(())
            }
            Act::Close(reason) => self.with_life(|s, life| {
                s.close(life, key, reason);
                Ok(())
            }),
            Act::Preempt => self.with_life(|s, life| {
                s.preempt(life, key);
                Ok(())
            }),
            Act::Refuse => Err(Unfit::WrongState),
        }
    }

    /// Ends what waited too long, or would.
    pub(crate) fn expire(&mut self, now: Timestamp) {
        while let Some((at, key)) = self.deadlines.first().copied()
            && at <= now
        {
            self.deadlines.pop_first();
            let Some(live) = self.requests.get_mut(key) else { continue };
            live.job_mut().alarm = None;
            let job = live.job();
            let request = job.id;
            if job.deadline.is_some_and(|deadline| deadline > now) {
                if let Err(reason) = self.set_alarm(now, key) {
                    self.finish_waiting(key, FinishReason::Refused(reason));
                }
            } else if let Err(unfit) = self.move_request(request, Move::Expire) {
                self.refuse(unfit);
            }
        }
    }

    /// Ends a request that holds nothing.
    pub(crate) fn finish_waiting(&mut self, key: Key, reason: FinishReason) {
        self.finish_in(self.life.as_ref().map(|life| life.incarnation), key, reason);
    }

    /// The same while the present life is being planned.
    pub(crate) fn finish_in(&mut self, life: Option<Incarnation>, key: Key, reason: FinishReason) {
        let finished = match self.requests.take(key) {
            Some(Live::Queued(request)) => request.finish(reason),
            Some(Live::Preempted(request)) => request.finish(reason),
            Some(other @ (Live::Prefilling(_) | Live::Decoding(_) | Live::Closing(_))) => {
                self.requests.put(key, other);
                return;
            }
            None => return,
        };
        let job = &finished.job;
        self.line.remove(job);
        if let Some(incarnation) = life {
            self.outbox.say(Output::Forget(incarnation, job.id));
        }
        let (request, reason, usage) = (job.id, finished.reason(), job.usage());
        self.outbox.say(Output::Finished { request, reason, usage });
        self.forget(key, &finished);
    }

    /// Frees the key and the id of a finished request.
    pub(crate) fn forget(&mut self, key: Key, finished: &Request<crate::request::Finished>) {
        let job = &finished.job;
        if let Some(at) = job.alarm {
            self.deadlines.remove(&(at, key));
        }
        self.line.leave(job.flow);
        self.ids.remove(&job.id);
        // The key will name another request.
        self.blocked = self.blocked.filter(|blocked| !blocked.is_of(key));
        self.requests.vacate(key);
    }
}

impl Drop for Scheduler {
    /// Blocks and slots complain when they are dropped by mistake; a scheduler that goes takes
    /// its worker's life with it on purpose.
    fn drop(&mut self) {
        if let Some(life) = self.life.take() {
            self.end_life(life);
        }
    }
}

/// Whether a sequence of this length can run alone.
pub(crate) fn fits(life: &Life, tokens: Tokens) -> Result<(), Refusal> {
    let need = life.cache.supers_for(&peak(&life.cache, tokens));
    let have = u64::from(life.cache.supers());
    if need > have { Err(Refusal::CacheTooSmall { tokens, need, have }) } else { Ok(()) }
}

pub(crate) fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
