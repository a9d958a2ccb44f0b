//! How a request loses its seat, and how one that needs blocks gets them.
//!
//! Preemption is by recompute and needs no draining: the slot is retired in the next plan, steps in
//! flight run on and their samples for the slot are dropped. Victims are taken from the end of the
//! line, never for memory that is already on its way, and only by a request before them in line:
//! the first in line can always run. Invariant: a seat that ends leaves its slot and its blocks
//! with the life, under the newest launched step.

use crate::job::Rank;
use crate::life::Life;
use crate::output::{FinishReason, Output};
use crate::plan::Draft;
use crate::report::Waits;
use crate::request::{Live, Seat};
use crate::scheduler::Scheduler;
use crate::slab::Key;
use crate::tables::Tables;
use ids::{Blocks, SlotId, Tokens};
use kv_cache::Shortage;
use step::SlotOp;

impl Scheduler {
    /// Puts a running request back in line.
    pub(crate) fn preempt(&mut self, life: &mut Life, key: Key) {
        let (request, seat) = match self.requests.take(key) {
            Some(Live::Prefilling(request)) => request.preempt(),
            Some(Live::Decoding(request)) => {
                self.leave_lane(life, request.state.lane);
                request.preempt()
            }
            Some(other @ (Live::Queued(_) | Live::Preempted(_) | Live::Closing(_))) => {
                self.requests.put(key, other);
                return;
            }
            None => return,
        };
        let rank = request.job.rank;
        self.requests.put(key, Live::Preempted(request));
        let Seat { slot, tables, .. } = seat;
        unseat(life, rank, slot.at().slot, tables);
        let (launched, retired) = (life.cache.launched(), life.cache.proof());
        life.slots.give_back(slot, launched, &retired);
        self.counters.preemptions += 1;
        self.line.give_back(rank, key);
        self.upload_to(life.incarnation, key);
        self.replan = true;
    }

    /// Ends a running request. The client hears of it now; the slot stays until no launched step
    /// refers to it.
    pub(crate) fn close(&mut self, life: &mut Life, key: Key, reason: FinishReason) {
        let launched = life.cache.launched();
        let (request, tables) = match self.requests.take(key) {
            Some(Live::Prefilling(request)) => request.close(reason, launched),
            Some(Live::Decoding(request)) => {
                self.leave_lane(life, request.state.lane);
                request.close(reason, launched)
            }
            Some(other @ (Live::Queued(_) | Live::Preempted(_) | Live::Closing(_))) => {
                self.requests.put(key, other);
                return;
            }
            None => return,
        };
        let job = &request.job;
        let (id, usage, rank) = (job.id, job.usage(), job.rank);
        if reason == FinishReason::Deadline {
            self.outlook.cut(usage.output);
        }
        unseat(life, rank, request.slot(), tables);
        self.outbox.say(Output::Finished { request: id, reason, usage });
        if let Some(at) = job.alarm {
            self.deadlines.remove(&(at, key));
        }
        self.requests.put(key, Live::Closing(request));
        life.closing.push_back(key);
        self.finish_closing(life);
    }

    /// Frees the slots of closing requests that no launched step refers to any more.
    pub(crate) fn finish_closing(&mut self, life: &mut Life) {
        let retired = life.cache.proof();
        while let Some(key) = life.closing.front().copied() {
            match self.requests.take(key) {
                Some(Live::Closing(request)) => match request.finish(&retired) {
                    Ok((finished, slot)) => {
                        life.slots.give_back(slot, ids::StepSeq::ZERO, &retired);
                        self.forget(key, &finished);
                    }
                    Err(still) => {
                        self.requests.put(key, Live::Closing(*still));
                        return;
                    }
                },
                Some(other) => self.requests.put(key, other),
                None => {}
            }
            life.closing.pop_front();
        }
    }

    /// Mints until a running request has blocks for `want` tokens. Part of it is enough to go on;
    /// where there is none, victims behind it in line give theirs.
    pub(crate) fn reach(
        &mut self,
        life: &mut Life,
        draft: &mut Draft,
        key: Key,
        want: Tokens,
    ) -> Result<(), Waits> {
        loop {
            let Some((job, seat)) = self.requests.get_mut(key).and_then(Live::seated) else {
                return Ok(());
            };
            let rank = job.rank;
            let mut blocks = self.spare.blocks();
            let extended = seat.tables.extend(&mut life.cache, want, life.frugal, &mut blocks);
            seat.capacity = seat.tables.capacity();
            life.copy_first(&mut self.counters);
            if blocks.is_empty() {
                self.spare.give_back(blocks);
            } else {
                life.ops.push(SlotOp::Extend { slot: seat.slot.at().slot, blocks });
            }
            let Err(Shortage { group }) = extended else { return Ok(()) };
            if seat.capacity > seat.planned {
                return Ok(());
            }
            let arriving = life.arriving(group);
            let on_its_way = arriving > draft.claimed;
            let victim = if on_its_way { None } else { self.victim(life, rank) };
            let Some(victim) = victim else {
                draft.claimed += Blocks(u32::from(on_its_way));
                let mintable = life.cache.mintable(group);
                return Err(Waits::Blocks { group, need: Blocks(1), mintable, arriving });
            };
            self.sacrifice(life, draft, victim);
        }
    }

    /// Who gives way to `rank`: of those behind it the worst class, in that the tenant that had most,
    /// of that the last in line.
    pub(crate) fn victim(&self, life: &Life, rank: Rank) -> Option<Key> {
        let (worst, _) = life.running.last_key_value()?;
        let of_class = life
            .running
            .iter()
            .rev()
            .take_while(|(behind, _)| **behind > rank && behind.priority == worst.priority);
        let mut victim: Option<(u64, Key)> = None;
        for (_, key) in of_class {
            let Some(live) = self.requests.get(*key) else { continue };
            let had = self.line.counter(live.job().flow);
            if victim.is_none_or(|(most, _)| had > most) {
                victim = Some((had, *key));
            }
        }
        victim.map(|(_, key)| key)
    }

    /// Preempts a request while a step is composed, which may run it already.
    pub(crate) fn sacrifice(&mut self, life: &mut Life, draft: &mut Draft, victim: Key) {
        if let Some(Live::Decoding(request)) = self.requests.get(victim)
            && request.state.ready
        {
            let context = u64::from(request.state.seat.planned.0);
            draft.load.decode = draft.load.decode.saturating_sub(1);
            draft.load.context = draft.load.context.saturating_sub(context);
        }
        if let Some(at) = draft.chunks.iter().position(|chunk| chunk.key == victim) {
            draft.room += draft.chunks.remove(at).tokens;
        }
        self.preempt(life, victim);
        draft.report.preempted += 1;
    }

    /// Takes a decoding request out of its lane; the last one moves there.
    fn leave_lane(&mut self, life: &mut Life, lane: usize) {
        life.decoding.swap_remove(lane);
        if let Some(moved) = life.decoding.get(lane)
            && let Some(Live::Decoding(request)) = self.requests.get_mut(*moved)
        {
            request.state.lane = lane;
        }
    }
}

/// Whether a running request stands behind `rank`.
pub(crate) fn any_behind(life: &Life, rank: Rank) -> bool {
    life.running.last_key_value().is_some_and(|(last, _)| *last > rank)
}

/// Takes a request out of the life's books and leaves its tables there.
fn unseat(life: &mut Life, rank: Rank, slot: SlotId, tables: Tables) {
    life.running.remove(&rank);
    life.prefilling.remove(&rank);
    life.leaving.retain(|leaving| *leaving != slot);
    life.ops.push(SlotOp::Retire { slot });
    life.draining.push_back(tables);
    life.drain();
    if life.running.is_empty() {
        life.isolated = false;
        life.frugal = false;
    }
}
