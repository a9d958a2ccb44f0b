//! What a step's result changes: confirmed tokens are kept, sealed, streamed; an end is an end.
//!
//! An outcome is taken whole or refused whole: it must answer the oldest step in flight of this
//! life and sample exactly the slots that the plan asked for. Samples for a slot whose request has
//! ended or lost its seat meanwhile are dropped, unbilled and unseen.
//! Invariant: KV is sealed only up to tokens that a retired step has confirmed.

use crate::life::{Flight, Life};
use crate::output::{FinishReason, Output, WorkerFault};
use crate::policy::fair;
use crate::report::Unfit;
use crate::request::Live;
use crate::scheduler::Scheduler;
use crate::slab::Key;
use core::time::Duration;
use ids::{Timestamp, Tokens};
use kv_cache::EpochError;
use step::{Outcome, PromptLogprobs, Sampled, SlotOp, SlotRef};

impl Scheduler {
    pub(crate) fn on_outcome(
        &mut self,
        life: &mut Life,
        now: Timestamp,
        outcome: Outcome,
    ) -> Result<(), Unfit> {
        if outcome.incarnation != life.incarnation {
            return Err(Unfit::StaleIncarnation);
        }
        let seq = outcome.seq;
        life.cache.may_retire(seq).map_err(|error| match error {
            EpochError::Repeated { .. } => Unfit::RepeatedOutcome,
            EpochError::Early { .. } => Unfit::EarlyOutcome,
            EpochError::NotLaunched { .. } => Unfit::UnknownStep,
        })?;
        let flight = life.flights.front().ok_or(Unfit::UnknownStep)?;
        if life.condemned || !life.slots.matches(seq, &flight.samplers, &outcome.sampled) {
            self.condemn(life, WorkerFault::Contradiction { seq });
            return Err(Unfit::Contradiction);
        }
        let retired = life.cache.retire(seq).map_err(|_| Unfit::UnknownStep)?;
        let flight = life.flights.pop_front().unwrap_or_default();
        life.head_since = now;
        let took = Duration::from_nanos(outcome.timing.total_ns);
        self.cost.observe(flight.load, took);
        self.outlook.step(took);
        for part in outcome.prompt_logprobs {
            self.deliver_prompt(part);
        }
        self.confirm_chunks(life, &flight);
        for sampled in outcome.sampled {
            self.confirm_sample(life, sampled);
        }
        life.spare.push(flight);
        life.slots.reclaim(&retired);
        life.cache.reclaim(retired);
        self.finish_closing(life);
        Ok(())
    }

    /// Whether an outcome samples what the oldest step in flight asked for.
    pub(crate) fn is_answered_by(&mut self, outcome: &Outcome) -> bool {
        let Some(life) = &mut self.life else { return false };
        let Some(oldest) = life.flights.front() else { return false };
        life.slots.matches(oldest.seq, &oldest.samplers, &outcome.sampled)
    }

    fn condemn(&mut self, life: &mut Life, reason: WorkerFault) {
        if !life.condemned {
            life.condemned = true;
            let incarnation = life.incarnation;
            self.outbox.say(Output::RestartWorker { incarnation, reason });
        }
    }

    /// Passes on what was not delivered before: a preempted prompt computes parts again.
    fn deliver_prompt(&mut self, mut part: PromptLogprobs) {
        let key = self.ids.get(&part.request).copied();
        let Some(live) = key.and_then(|key| self.requests.get_mut(key)) else { return };
        match live {
            Live::Closing(_) => return,
            Live::Queued(_) | Live::Preempted(_) | Live::Prefilling(_) | Live::Decoding(_) => {}
        }
        let job = live.job_mut();
        let known = job.logprobs_from.saturating_sub(part.first).as_usize();
        if part.first > job.logprobs_from || known >= part.entries.len() {
            return;
        }
        part.entries.drain(..known);
        part.first = job.logprobs_from;
        let entries = u32::try_from(part.entries.len()).unwrap_or(u32::MAX);
        job.logprobs_from = Tokens(job.logprobs_from.0.saturating_add(entries));
        self.outbox.say(Output::PromptLogprobs(part));
    }

    fn confirm_chunks(&mut self, life: &mut Life, flight: &Flight) {
        for (at, computed) in &flight.chunks {
            if let Some(key) = life.slots.occupant(*at) {
                self.confirm(life, key, *computed);
            }
        }
    }

    /// Takes note that KV is written up to `computed`: seals full blocks, gives up what no later
    /// token reads.
    fn confirm(&mut self, life: &mut Life, key: Key, computed: Tokens) {
        let Some((job, seat)) = self.requests.get_mut(key).and_then(Live::seated) else { return };
        // Chunks of one step and samples of later ones confirm in order; a sample may repeat what
        // its own chunk confirmed.
        let crossed = seat.computed.blocks_full() < computed.blocks_full();
        let moved = seat.computed < computed;
        seat.computed = seat.computed.max(computed);
        if job.deaths > 0 && computed > job.danger {
            // It got past the point where workers died, so something else killed them.
            job.deaths = 0;
            life.isolated = false;
        }
        if crossed && self.config.prefix_caching {
            seat.tables.seal(&mut life.cache, computed, job, &self.config.hash_key);
        }
        if moved && life.cache.slides() {
            let (slot, ops) = (seat.slot.at().slot, &mut life.ops);
            seat.tables.trim(&mut life.cache, computed, |group, first_live| {
                ops.push(SlotOp::Trim { slot, group, first_live });
            });
        }
    }

    fn confirm_sample(&mut self, life: &mut Life, sampled: Sampled) {
        let at = SlotRef { slot: sampled.slot, generation: sampled.generation };
        let key = life.slots.occupant(at);
        let live = key.and_then(|key| Some((key, self.requests.get_mut(key)?)));
        let (key, request) = match live {
            Some((key, Live::Decoding(request))) => (key, request),
            // Ended or lost its seat after the step was launched.
            Some((
                _,
                Live::Queued(_) | Live::Preempted(_) | Live::Prefilling(_) | Live::Closing(_),
            ))
            | None => {
                self.counters.dropped_tokens += 1;
                return;
            }
        };
        if let Some(fault) = sampled.fault {
            self.close(life, key, FinishReason::Fault(fault));
            return;
        }
        let known = request.job.known();
        if !request.job.generates() {
            self.confirm(life, key, known);
            self.close(life, key, FinishReason::Length);
            return;
        }
        let token = sampled.token;
        request.job.output.push(token);
        let (id, verdict) = (request.job.id, request.job.verdict(token));
        let generated = request.job.usage().output;
        self.line.charge(request.job.flow, fair::OUTPUT);
        // The step that drew the token had run everything before it.
        self.confirm(life, key, known);
        self.outbox.say(Output::Token { request: id, token, logprobs: sampled.logprobs });
        if let Some(reason) = verdict {
            self.outlook.ended(generated);
            self.close(life, key, reason);
        }
    }
}
