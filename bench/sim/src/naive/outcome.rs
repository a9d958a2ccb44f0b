//! What a step's result must change.
//!
//! It plans nothing. Invariant: a block gets its name only when a step that is over has written it.

use super::cache::first_read;
use super::{Naive, Phase, State, Taken};
use core::time::Duration;
use ids::{BLOCK_TOKENS, GroupId, RequestId, StepSeq, Timestamp, Tokens};
use scheduler::{FinishReason, Output, Unfit, WorkerFault};
use step::{Outcome, PromptLogprobs, Sampled, SlotOp, SlotRef};

impl Naive {
    /// Whether an outcome is the one that is due and answers its plan.
    ///
    /// # Errors
    /// Why it is not.
    pub fn judge(&self, outcome: &Outcome) -> Taken {
        let Some(life) = &self.life else { return Err(Unfit::StaleIncarnation) };
        if outcome.incarnation != life.incarnation {
            return Err(Unfit::StaleIncarnation);
        }
        let seq = outcome.seq.0;
        if seq > life.cache.launched {
            return Err(Unfit::UnknownStep);
        }
        if seq <= life.cache.retired {
            return Err(Unfit::RepeatedOutcome);
        }
        if seq > life.cache.retired + 1 {
            return Err(Unfit::EarlyOutcome);
        }
        let Some(flight) = life.flights.front() else { return Err(Unfit::UnknownStep) };
        let mut asked: Vec<SlotRef> = flight.samplers.iter().map(|(_, at)| *at).collect();
        let mut answered: Vec<SlotRef> = outcome.sampled.iter().map(slot_of).collect();
        asked.sort_unstable();
        answered.sort_unstable();
        let answers = !life.condemned && asked == answered;
        if answers { Ok(()) } else { Err(Unfit::Contradiction) }
    }

    pub(super) fn outcome(&mut self, now: Timestamp, outcome: &Outcome) -> Taken {
        let seq = outcome.seq.0;
        if let Err(unfit) = self.judge(outcome) {
            if unfit == Unfit::Contradiction {
                self.condemn(WorkerFault::Contradiction { seq: StepSeq(seq) });
            }
            return Err(unfit);
        }
        let Some(life) = &mut self.life else { return Err(Unfit::StaleIncarnation) };
        let Some(flight) = life.flights.pop_front() else { return Err(Unfit::UnknownStep) };
        life.cache.retired = seq;
        life.head_since = now;
        self.cost.observe(flight.load, Duration::from_nanos(outcome.timing.total_ns));
        outcome.prompt_logprobs.iter().for_each(|part| self.tell_prompt(part));
        for (request, at, computed) in flight.chunks {
            if self.sits(request, at) {
                self.confirm(request, computed);
            }
        }
        for sampled in &outcome.sampled {
            let at = slot_of(sampled);
            let who = flight.samplers.iter().find(|(_, slot)| *slot == at);
            if let Some((request, at)) = who
                && self.sits(*request, *at)
            {
                self.take_sample(*request, sampled);
            }
        }
        if let Some(life) = &mut self.life {
            let over = |(until, _): &(u64, u32)| *until <= seq;
            life.free.extend(life.slot_limbo.iter().filter(|l| over(l)).map(|(_, slot)| *slot));
            life.slot_limbo.retain(|l| !over(l));
            life.cache.reclaim();
        }
        self.finish_closing();
        Ok(())
    }

    /// Whether a request still has the seat that it had.
    fn sits(&self, request: RequestId, at: SlotRef) -> bool {
        let seat = self.find(request).and_then(|i| self.requests[i].seat());
        seat.is_some_and(|seat| seat.at == at)
    }

    fn tell_prompt(&mut self, part: &PromptLogprobs) {
        let Some(at) = self.find(part.request) else { return };
        let r = &mut self.requests[at];
        let end = part.first.0 + part.entries.len() as u32;
        if r.phase() == Phase::Closing || part.first.0 > r.untold || end <= r.untold {
            return;
        }
        let entries = part.entries[(r.untold - part.first.0) as usize..].to_vec();
        let first = Tokens(r.untold);
        r.untold = end;
        let request = part.request;
        self.say(Output::PromptLogprobs(PromptLogprobs { request, first, entries }));
    }

    /// Everything before `computed` is written.
    fn confirm(&mut self, request: RequestId, computed: u32) {
        let (Some(at), Some(life)) = (self.find(request), &mut self.life) else { return };
        let r = &mut self.requests[at];
        let (tokens, root) = (r.tokens(), r.submit.root);
        let State::Seated(seat) = &mut r.state else { return };
        if r.deaths > 0 && computed > r.danger {
            r.deaths = 0;
            life.isolated = false;
        }
        if computed <= seat.computed {
            return;
        }
        seat.computed = computed;
        let slot = seat.at.slot;
        for (group, table) in seat.tables.iter_mut().enumerate() {
            let full = computed / BLOCK_TOKENS;
            for (logical, (block, shared)) in (table.skipped..).zip(&mut table.blocks) {
                if self.config.prefix_caching && logical < full && !*shared {
                    let end = ((logical + 1) * BLOCK_TOKENS) as usize;
                    life.cache.seal(group, *block, root, &tokens[..end]);
                    *shared = true;
                }
            }
            let read_from = first_read(life.cache.kind(group), computed).min(table.end());
            if read_from <= table.skipped {
                continue;
            }
            let passed = (read_from - table.skipped) as usize;
            for (block, _) in table.blocks.drain(..passed) {
                life.cache.give_back(group, block);
            }
            table.skipped = read_from;
            let group = GroupId(group as u8);
            life.ops.push(SlotOp::Trim { slot, group, first_live: read_from });
        }
    }

    fn take_sample(&mut self, request: RequestId, sampled: &Sampled) {
        let Some(at) = self.find(request) else { return };
        let r = &mut self.requests[at];
        if let Some(fault) = sampled.fault {
            self.close(request, FinishReason::Fault(fault));
            return;
        }
        let known = r.known();
        let (submit, token) = (&r.submit, sampled.token);
        if submit.max_tokens.is_zero() {
            self.confirm(request, known);
            self.close(request, FinishReason::Length);
            return;
        }
        r.output.push(token);
        let generated = Tokens(r.output.len() as u32);
        let end_token = !submit.ignore_eos && submit.end_tokens.contains(&token);
        let ends = end_token || submit.stop_tokens.contains(&token);
        let enough = generated >= submit.max_tokens;
        let over = if ends && generated >= submit.sampling.min_tokens {
            Some(FinishReason::Stop(token))
        } else {
            enough.then_some(FinishReason::Length)
        };
        self.confirm(request, known);
        self.say(Output::Token { request, token, logprobs: sampled.logprobs.clone() });
        if let Some(reason) = over {
            self.close(request, reason);
        }
    }
}

fn slot_of(sampled: &Sampled) -> SlotRef {
    SlotRef { slot: sampled.slot, generation: sampled.generation }
}
