//! The worker's comings and goings. A death turns every live request into new work: tokens,
//! place in line and deadline are kept, KV is not.
//!
//! It neither starts nor kills workers; it says when one must go. A request under which workers
//! die twice runs alone, so that it can take no other down, and ends when that kills one too.
//! Invariant: nothing of an earlier life is left when the next begins.

use crate::event::WorkerReady;
use crate::life::Life;
use crate::output::{FinishReason, Output, WorkerFault};
use crate::report::Unfit;
use crate::request::Live;
use crate::scheduler::{Scheduler, fits};
use crate::slab::Key;
use core::time::Duration;
use ids::{Incarnation, StepSeq, Timestamp, Tokens};
use step::Upload;

/// Deaths in a row that end a request: two among others and one alone.
const DEATHS_MOST: u32 = 3;
/// A step may take this many times its predicted duration before it counts as hung.
const OVERDUE_FACTOR: u32 = 10;

impl Scheduler {
    pub(crate) fn on_ready(&mut self, now: Timestamp, ready: &WorkerReady) -> Result<(), Unfit> {
        if self.newest.is_some_and(|newest| ready.incarnation <= newest) {
            return Err(Unfit::StaleIncarnation);
        }
        if let Some(life) = self.life.take() {
            self.lose(life);
        }
        self.newest = Some(ready.incarnation);
        let life = self.life.insert(Life::new(ready, self.config.max_running, now));
        let mut too_large = Vec::new();
        for key in self.line.in_order() {
            let Some(live) = self.requests.get(key) else { continue };
            if let Err(reason) = fits(life, live.job().limit()) {
                too_large.push((key, reason));
            }
        }
        for (key, reason) in too_large {
            self.finish_waiting(key, FinishReason::Refused(reason));
        }
        for key in self.line.in_order() {
            self.upload(key);
        }
        Ok(())
    }

    pub(crate) fn on_lost(&mut self, incarnation: Incarnation) -> Result<(), Unfit> {
        match self.life.take() {
            Some(life) if life.incarnation == incarnation => {
                self.lose(life);
                Ok(())
            }
            other => {
                self.life = other;
                Err(Unfit::StaleIncarnation)
            }
        }
    }

    /// Ends a life and requeues what ran in it.
    fn lose(&mut self, life: Life) {
        self.counters.deaths += 1;
        let in_flight = !life.flights.is_empty();
        for key in self.end_life(life) {
            let Some(live) = self.requests.get_mut(key) else { continue };
            let job = live.job_mut();
            job.deaths += u32::from(in_flight);
            let deaths = job.deaths;
            self.line.give_back(job.rank, key);
            if deaths >= DEATHS_MOST {
                self.finish_waiting(key, FinishReason::WorkerDied { deaths });
            }
        }
    }

    /// Voids every handle of a life. Returns the requests that had a seat, now preempted.
    pub(crate) fn end_life(&mut self, life: Life) -> Vec<Key> {
        self.blocked = None;
        self.head = None;
        self.stalls.clear();
        let buried = life.cache.bury();
        life.draining.into_iter().for_each(|tables| tables.void(&buried));
        let mut unseated = Vec::new();
        for key in self.requests.keys() {
            match self.requests.take(key) {
                Some(Live::Prefilling(mut request)) => {
                    request.job.danger = request.state.seat.planned;
                    self.requests.put(key, Live::Preempted(request.lose(&buried)));
                    unseated.push(key);
                }
                Some(Live::Decoding(mut request)) => {
                    request.job.danger = request.state.seat.planned;
                    self.requests.put(key, Live::Preempted(request.lose(&buried)));
                    unseated.push(key);
                }
                Some(Live::Closing(request)) => {
                    let finished = request.lose(&buried);
                    self.forget(key, &finished);
                }
                Some(other @ (Live::Queued(_) | Live::Preempted(_))) => {
                    self.requests.put(key, other);
                }
                None => {}
            }
        }
        unseated
    }

    /// Sends a request's tokens ahead.
    pub(crate) fn upload(&mut self, key: Key) {
        let Some(incarnation) = self.life.as_ref().map(|life| life.incarnation) else { return };
        self.upload_to(incarnation, key);
    }

    /// Sends prompt and output so far to the worker.
    pub(crate) fn upload_to(&mut self, incarnation: Incarnation, key: Key) {
        let Some(live) = self.requests.get_mut(key) else { return };
        let job = live.job_mut();
        let request = job.id;
        let part = |offset, tokens| Upload { incarnation, request, offset, tokens };
        job.upload = self.outbox.say(Output::Upload(part(Tokens::ZERO, job.prompt.clone())));
        if !job.output.is_empty() {
            let output = job.output.as_slice().into();
            job.upload = self.outbox.say(Output::Upload(part(job.prompt_tokens(), output)));
        }
    }

    /// When the oldest step in flight counts as hung, and which it is.
    pub(crate) fn overdue_at(&self) -> Option<(Timestamp, StepSeq)> {
        let life = self.life.as_ref().filter(|life| !life.condemned)?;
        let (allowed, seq) = self.allowance()?;
        Some((life.head_since.after(allowed), seq))
    }

    /// What the oldest step in flight may take, and which it is.
    pub(crate) fn allowance(&self) -> Option<(Duration, StepSeq)> {
        let oldest = self.life.as_ref()?.flights.front()?;
        let usual = self.cost.predict(oldest.load).unwrap_or(Duration::ZERO);
        let allowed = self.config.step_timeout.saturating_add(usual * OVERDUE_FACTOR);
        Some((allowed, oldest.seq))
    }

    pub(crate) fn condemn_overdue(&mut self, now: Timestamp) {
        if let Some((at, seq)) = self.overdue_at()
            && at <= now
            && let Some(life) = &mut self.life
        {
            life.condemned = true;
            let reason = WorkerFault::Overdue { seq, waited: now.since(life.head_since) };
            self.outbox.say(Output::RestartWorker { incarnation: life.incarnation, reason });
        }
    }
}
