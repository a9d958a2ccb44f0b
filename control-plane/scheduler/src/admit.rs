//! Who leaves the queue: the first in line, when slot, blocks and room for a chunk are there.
//!
//! Strictly in the order of the line, so that waiting is bounded by those before. A request is admitted only when its whole known sequence could be held beside what the running need next,
//! so that admission is not soon undone. Invariant: an admitted request runs at least one token in
//! the step that admits it.

use crate::job::Rank;
use crate::life::Life;
use crate::line::Turn;
use crate::output::Output;
use crate::plan::{Chunk, Draft};
use crate::policy::fair;
use crate::preempt::any_behind;
use crate::report::Waits;
use crate::request::{Live, Seat};
use crate::scheduler::{Scheduler, count};
use crate::slab::Key;
use crate::slots::SlotLease;
use crate::tables::{Tables, group_id, peak};
use ids::{BlockHash, Blocks, GroupId, StepSeq, Tokens};
use kv_cache::{Hit, Shortage, first_live};
use step::{Admit, SlotOp};

/// Where and when admission last found blocks short.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Blocked {
    key: Key,
    group: GroupId,
    need: Blocks,
    running: usize,
}

impl Blocked {
    pub(crate) fn is_of(&self, key: Key) -> bool {
        self.key == key
    }
}

impl Scheduler {
    pub(crate) fn admit_waiting(&mut self, life: &mut Life, draft: &mut Draft) {
        self.head = None;
        while let Some(turn) = self.next_turn() {
            let key = turn.key;
            match self.try_admit(life, draft, turn) {
                Ok(()) => {}
                Err(waits) => {
                    let Some(live) = self.requests.get(key) else { return };
                    self.head = Some((live.job().id, waits));
                    if let (Live::Queued(request), Waits::Blocks { .. }) = (live, waits) {
                        self.line.hold(&request.job);
                    }
                    return;
                }
            }
        }
    }

    /// Whose turn it is.
    fn next_turn(&mut self) -> Option<Turn> {
        let (requests, outlook) = (&self.requests, &self.outlook);
        self.line.next(|key| {
            let Some(live) = requests.get(key) else { return 0 };
            let (least, most) = live.job().to_come();
            let output = outlook.likely_output(least, most);
            fair::PROMPT * u64::from(live.job().prompt_tokens().0)
                + fair::OUTPUT * u64::from(output.0)
        })
    }

    fn try_admit(&mut self, life: &mut Life, draft: &mut Draft, turn: Turn) -> Result<(), Waits> {
        let Turn { key, rank, .. } = turn;
        let Some(live) = self.requests.get_mut(key) else { return Err(Waits::Worker) };
        let job = live.job_mut();
        if !self.outbox.left(job.upload) {
            return Err(Waits::Upload);
        }
        // Who must be alone is alone in every shard of the group.
        if self.beside.barred || (job.suspect() && self.beside.running) {
            return Err(Waits::Isolation);
        }
        let alone = life.isolated || life.frugal || job.suspect();
        if alone && !life.running.is_empty() {
            return Err(Waits::Isolation);
        }
        if draft.room.is_zero() {
            return Err(self.no_room(draft));
        }
        // Nobody gives up a seat for one that could not use it; the prompt may be in the cache.
        if let Some(end) = self.too_late(draft.now, key, Tokens::ZERO) {
            self.finish_in(Some(life.incarnation), key, end);
            return Ok(());
        }
        self.secure_slot(life, draft, rank)?;
        if let Some(waits) = self.still_blocked(life, rank, key) {
            return Err(waits);
        }
        let (hashes, hit) = self.find_prefix(life, key);
        let known = self.requests.get(key).map_or(Tokens::ZERO, |live| live.job().known());
        let left = known.saturating_sub(hit.boundary.tokens());
        if let Some(end) = self.too_late(draft.now, key, left) {
            self.finish_in(Some(life.incarnation), key, end);
            return Ok(());
        }
        if self.waits_whole(draft, key, left) {
            return Err(self.no_room(draft));
        }
        self.secure_blocks(life, draft, rank, key, &hashes, hit)?;
        self.take_seat(life, draft, turn, &hashes, hit)?;
        draft.report.admitted += 1;
        Ok(())
    }

    /// Waits for a slot on its way, else takes one from the end of the line.
    fn secure_slot(&mut self, life: &mut Life, draft: &mut Draft, rank: Rank) -> Result<(), Waits> {
        if life.slots.free() > 0 {
            return Ok(());
        }
        let arriving = life.slots.arriving() + life.closing.len();
        if arriving == 0
            && let Some(victim) = self.victim(life, rank)
        {
            self.sacrifice(life, draft, victim);
        }
        if life.slots.free() > 0 {
            return Ok(());
        }
        let arriving = count(life.slots.arriving() + life.closing.len());
        Err(Waits::Slot { rows: self.config.max_running, arriving })
    }

    /// What the last attempt found short, while it still is and nobody can be made to give it:
    /// a long prompt is not looked up again in every step that it waits.
    fn still_blocked(&self, life: &Life, rank: Rank, key: Key) -> Option<Waits> {
        let Blocked { key: blocked, group, need, running } = self.blocked?;
        let mintable = life.cache.mintable(group);
        // What the running are promised is part of the need, and goes with them.
        if blocked != key || mintable >= need || life.running.len() < running {
            return None;
        }
        let arriving = life.arriving(group);
        let hopeless = arriving >= need - mintable || !any_behind(life, rank);
        hopeless.then_some(Waits::Blocks { group, need, mintable, arriving })
    }

    /// The longest cached prefix that leaves a token to compute.
    fn find_prefix(&mut self, life: &Life, key: Key) -> (Vec<BlockHash>, Hit) {
        let nothing = (Vec::new(), Hit::NONE);
        let Some(live) = self.requests.get_mut(key) else { return nothing };
        let job = live.job_mut();
        if !self.config.prefix_caching || job.logprobs_due().is_some() {
            return nothing;
        }
        let most = Tokens(job.known().0 - 1).blocks_full();
        let hashes = job.hashes(&self.config.hash_key, most.as_usize());
        let hit = life.cache.lookup(&hashes);
        (hashes, hit)
    }

    /// Makes sure that the whole known sequence could be held, beside the rest of prompts under
    /// way and one more block for each running request.
    fn secure_blocks(
        &mut self,
        life: &mut Life,
        draft: &mut Draft,
        rank: Rank,
        key: Key,
        hashes: &[BlockHash],
        hit: Hit,
    ) -> Result<(), Waits> {
        self.blocked = None;
        let Some(live) = self.requests.get(key) else { return Err(Waits::Worker) };
        let peaks = peak(&life.cache, live.job().known());
        for (i, most) in peaks.iter().enumerate() {
            let group = group_id(i);
            let live_from = first_live(life.cache.kind(group), hit.boundary.tokens());
            let hits = hit.boundary.saturating_sub(live_from);
            loop {
                let own = most.saturating_sub(hits);
                let claimed = life.cache.claimed_by(group, hashes, hit);
                let need = own + claimed + self.spoken_for(life, group);
                let mintable = life.cache.mintable(group);
                if mintable >= need {
                    break;
                }
                let missing = need - mintable;
                let arriving = life.arriving(group);
                let victim = if arriving >= missing { None } else { self.victim(life, rank) };
                let Some(victim) = victim else {
                    let running = life.running.len();
                    self.blocked = Some(Blocked { key, group, need, running });
                    return Err(Waits::Blocks { group, need, mintable, arriving });
                };
                self.sacrifice(life, draft, victim);
            }
        }
        Ok(())
    }

    /// Blocks of a group that running requests will take before this one may grow.
    fn spoken_for(&self, life: &Life, group: GroupId) -> Blocks {
        let rest = |key: &Key| {
            let live = self.requests.get(*key)?;
            let most = peak(&life.cache, live.job().known()).get(group.index()).copied()?;
            Some(most.saturating_sub(live.seat()?.tables.held(group)))
        };
        let prompts: Blocks = life.prefilling.values().filter_map(rest).sum();
        prompts + Blocks(count(life.running.len()))
    }

    fn take_seat(
        &mut self,
        life: &mut Life,
        draft: &mut Draft,
        turn: Turn,
        hashes: &[BlockHash],
        hit: Hit,
    ) -> Result<(), Waits> {
        let key = turn.key;
        let Some(live) = self.requests.get(key) else { return Err(Waits::Worker) };
        let (known, limit) = (live.job().known(), live.job().limit());
        let cached = hit.boundary.tokens();
        let size = self.chunk_size(life, draft, known, cached);
        let Some(slot) = life.slots.take(key) else {
            return Err(Waits::Slot { rows: self.config.max_running, arriving: 0 });
        };
        let acquired = life.cache.acquire(hashes, hit, life.frugal);
        life.copy_first(&mut self.counters);
        let prefixes = match acquired {
            Ok(prefixes) => prefixes,
            Err(short) => return Err(no_seat(life, slot, short, size)),
        };
        let mut tables = Tables::new(prefixes, limit.blocks_ceil());
        let shared = tables.admit();
        let mut blocks = Vec::new();
        let extended = tables.extend(&mut life.cache, cached + size, life.frugal, &mut blocks);
        life.copy_first(&mut self.counters);
        let seat = Seat::new(slot, tables, cached);
        if let Err(short) = extended
            && seat.capacity <= cached
        {
            let Seat { slot, mut tables, .. } = seat;
            tables.release_tail(&mut life.cache, u32::MAX);
            return Err(no_seat(life, slot, short, size));
        }
        let tokens = seat.capacity.min(cached + size) - cached;
        let at = seat.slot.at();
        // It stands in line under its own rank.
        if let Some(live) = self.requests.get(key) {
            self.line.remove(live.job());
        }
        let request = match self.requests.take(key) {
            Some(Live::Queued(request)) => request.admit(seat),
            Some(Live::Preempted(request)) => request.admit(seat),
            // Only these two wait in line.
            Some(other @ (Live::Prefilling(_) | Live::Decoding(_) | Live::Closing(_))) => {
                self.requests.put(key, other);
                return Err(Waits::Worker);
            }
            None => return Err(Waits::Worker),
        };
        let mut request = request;
        let job = &mut request.job;
        job.reserve_output();
        life.ops.push(SlotOp::Admit(Box::new(Admit {
            slot: at,
            request: job.id,
            known,
            prompt: job.prompt_tokens(),
            cached,
            tables: shared,
            sampling: job.sampling.clone(),
            prompt_logprobs: job.logprobs_due(),
        })));
        if !blocks.is_empty() {
            life.ops.push(SlotOp::Extend { slot: at.slot, blocks });
        }
        self.counters.prefix_query_tokens += u64::from(known.0);
        self.counters.prefix_hit_tokens += u64::from(cached.0);
        let resident = hit.resident.tokens();
        self.counters.host_hit_tokens += u64::from(cached.saturating_sub(resident).0);
        job.rank = turn.seated;
        if job.cached.is_none() {
            job.cached = Some(cached);
            // What a preempted request runs again is nobody's wish.
            self.line.charge(job.flow, u64::from((known - cached).0) * fair::PROMPT);
            self.outlook.admitted(draft.now, job.prompt_tokens(), self.line.len().1 > 0);
            self.counters.overdue += u64::from(turn.seated != turn.rank);
            self.outbox.say(Output::Started { request: job.id, cached });
        }
        life.isolated |= job.suspect();
        life.running.insert(job.rank, key);
        life.prefilling.insert(job.rank, key);
        self.requests.put(key, Live::Prefilling(request));
        draft.room -= tokens;
        draft.chunks.push(Chunk { key, tokens });
        Ok(())
    }
}

/// Gives back a slot that no plan has named yet, whose blocks went back, as if nothing had been.
fn no_seat(life: &mut Life, slot: SlotLease, short: Shortage, size: Tokens) -> Waits {
    life.slots.give_back(slot, StepSeq::ZERO, &life.cache.proof());
    let (group, need) = (short.group, size.blocks_ceil());
    let (mintable, arriving) = (life.cache.mintable(group), life.arriving(group));
    Waits::Blocks { group, need, mintable, arriving }
}
