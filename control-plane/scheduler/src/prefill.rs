//! The prefill part of a step: how many prompt tokens fit, and whose.
//!
//! Chunks are cut by the step's size, the cap per request, the decode budget, and the blocks at
//! hand; a smaller chunk is preferred to a victim. It does not admit. Invariant: some prompt
//! advances in every step, however slow decoding is.

use crate::life::Life;
use crate::plan::{Chunk, Draft};
use crate::report::Waits;
use crate::request::Live;
use crate::scheduler::Scheduler;
use crate::slab::Key;
use ids::{BLOCK_TOKENS, Tokens};

/// Prompt tokens that a step takes even when decoding alone breaks the budget.
const CHUNK_LEAST: u32 = BLOCK_TOKENS;

/// The part of a step's room for prompts that may stay empty, so that a prompt is not cut: one of so many.
const SPARE: u32 = 4;

impl Scheduler {
    /// How many prompt tokens the step takes beside its decodes.
    pub(crate) fn set_room(&self, life: &Life, draft: &mut Draft) {
        let decode = Tokens(draft.load.decode);
        draft.room = self.config.max_step_tokens.saturating_sub(decode);
        if !life.decoding.is_empty()
            && let Some(room) = self.cost.prefill_room(draft.load, self.config.decode_budget)
        {
            let room = Tokens(room.max(CHUNK_LEAST));
            draft.by_budget = room < draft.room;
            draft.room = room.min(draft.room);
        }
        draft.whole_room = draft.room;
    }

    /// Whether a prompt of which `left` tokens are to be computed waits for the next step, which takes it
    /// whole, rather than be cut here: a cut costs the rest of it another reading of what is in front.
    /// It waits only behind other prompts and where little of this step stays empty, and only once: what is
    /// in front may leave no more room in the steps that follow.
    pub(crate) fn waits_whole(&mut self, draft: &Draft, key: Key, left: Tokens) -> bool {
        let fits = left <= draft.whole_room.min(self.config.max_chunk);
        let little = draft.room.0 <= draft.whole_room.0 / SPARE;
        let waits = !draft.chunks.is_empty() && left > draft.room && fits && little;
        let job = self.requests.get_mut(key).map(Live::job_mut);
        waits && job.is_some_and(|job| !core::mem::replace(&mut job.gave_way, true))
    }

    /// Continues requests whose prompts are under way.
    pub(crate) fn plan_prefills(&mut self, life: &mut Life, draft: &mut Draft) {
        if life.prefilling.is_empty() {
            return;
        }
        let keys: Vec<Key> = life.prefilling.values().copied().collect();
        for key in keys {
            // One that lost its seat to an earlier one in line is not prefilling any more.
            let Some(Live::Prefilling(request)) = self.requests.get(key) else { continue };
            let (id, planned) = (request.job.id, request.state.seat.planned);
            let size = self.chunk_size(life, draft, request.job.known(), planned);
            if size.is_zero() {
                let waits = self.no_room(draft);
                self.stalls.push((id, waits));
                continue;
            }
            if let Err(waits) = self.reach(life, draft, key, planned + size) {
                self.stalls.push((id, waits));
                continue;
            }
            let capacity = self.requests.get(key).and_then(Live::seat).map(|seat| seat.capacity);
            let tokens = capacity.unwrap_or(planned).min(planned + size) - planned;
            draft.room -= tokens;
            draft.chunks.push(Chunk { key, tokens });
        }
    }

    /// The largest chunk that the limits allow.
    pub(crate) fn chunk_size(
        &self,
        life: &Life,
        draft: &Draft,
        known: Tokens,
        planned: Tokens,
    ) -> Tokens {
        let cap = if life.frugal { Tokens(BLOCK_TOKENS) } else { Tokens(u32::MAX) };
        let left = known.saturating_sub(planned);
        left.min(draft.room).min(self.config.max_chunk).min(cap)
    }

    /// Why the step takes no more prompt tokens.
    pub(crate) fn no_room(&self, draft: &Draft) -> Waits {
        if draft.by_budget {
            Waits::DecodeBudget { budget: self.config.decode_budget }
        } else {
            Waits::StepTokens { limit: self.config.max_step_tokens }
        }
    }
}
