//! What the next step must be: who decodes, whose prompt goes on, who is let in, who gives way.
//!
//! It takes no result. Invariant: everything it decides follows from the list of requests, the
//! cache, and the limits.

use super::life::{Flight, Life};
use super::{Blocked, Naive, Phase, Rank, Seat, State};
use ids::{
    BLOCK_TOKENS, BlockId, GroupId, RequestId, SlotGeneration, SlotId, StepSeq, Timestamp, Tokens,
};
use scheduler::{Load, Output};
use step::{
    Admit, DecodeDelta, GroupTable, PrefillRun, Section, SlotOp, SlotRef, StepPlan, WriteSlot,
};

/// Prompt tokens that a step takes however slow it is.
const CHUNK_LEAST: u32 = 64;
/// Prompt tokens that make a step long.
const LONG: u32 = 512;
/// Sizes that steps are padded to are these times powers of two.
const MANTISSAS: [u32; 2] = [2, 3];

/// A step as far as it is decided.
#[derive(Debug, Default)]
struct Draft {
    chunks: Vec<(RequestId, u32)>,
    decode: u32,
    context: u64,
    room: u32,
    whole_room: u32,
    /// Blocks on their way that somebody counts on.
    claimed: u32,
    /// Whether the first in line waits for blocks.
    short: bool,
}

impl Draft {
    fn idle(&self) -> bool {
        self.decode == 0 && self.chunks.is_empty()
    }
}

/// Why the first in line is not let in.
enum Wait {
    Blocks,
    /// For others to be gone.
    Alone,
    Else,
}

impl Naive {
    /// The next step, or none.
    pub fn plan_step(&mut self, now: Timestamp) -> Option<StepPlan> {
        self.expire(now);
        self.replan = false;
        if !self.may_plan() {
            return None;
        }
        let life = self.life.as_mut()?;
        let lull = life.flights.is_empty();
        life.slice = self.config.release_slice;
        life.drain();
        let mut draft = self.compose();
        if draft.idle() && lull {
            let life = self.life.as_mut()?;
            if !life.draining.is_empty() {
                life.slice = u32::MAX;
                life.drain();
                draft = self.compose();
            }
            if draft.idle() && (draft.short || !self.running().is_empty()) {
                self.start_over();
                draft = self.compose();
            }
        }
        if draft.idle() { None } else { self.launch(&draft, now) }
    }

    /// Whether so few steps are under way that another may follow; without a worker nothing forbids it.
    pub(super) fn may_plan(&self) -> bool {
        let Some(life) = &self.life else { return true };
        let long = life.flights.iter().skip(1).any(|flight| flight.load.prefill >= LONG);
        let ahead = match (life.frugal, long) {
            (true, _) => 0,
            (false, true) => self.config.depth.min(1),
            (false, false) => self.config.depth,
        };
        !life.condemned && life.flights.len() <= ahead as usize
    }

    /// The part of a step in which nobody here runs: who decodes sits it out.
    pub(super) fn stand_still(&mut self) -> Section {
        let Some(life) = &mut self.life else { return Section::default() };
        let ops = core::mem::take(&mut life.ops);
        let mut section = Section { ops, ..Section::default() };
        for r in &mut self.requests {
            if let State::Seated(seat) = &mut r.state
                && core::mem::take(&mut seat.in_set)
            {
                section.decode.leave.push(seat.at.slot);
            }
        }
        section
    }

    fn compose(&mut self) -> Draft {
        let mut draft = Draft::default();
        self.decodes(&mut draft);
        self.prompts(&mut draft);
        self.admissions(&mut draft);
        draft
    }

    /// Nobody can go on: one alone, with an empty pool, can.
    fn start_over(&mut self) {
        self.running().into_iter().for_each(|request| self.preempt(request));
        if let Some(life) = &mut self.life {
            life.slice = u32::MAX;
            life.drain();
            life.cache.purge();
            life.ops.append(&mut life.cache.copies);
            life.frugal = true;
        }
    }

    fn seat_mut(&mut self, request: RequestId) -> Option<&mut Seat> {
        let at = self.find(request)?;
        match &mut self.requests[at].state {
            State::Seated(seat) => Some(seat),
            State::Waiting { .. } | State::Closing { .. } => None,
        }
    }

    /// Everybody who decodes runs one token, if there is a place for it.
    fn decodes(&mut self, draft: &mut Draft) {
        for request in self.in_line(|phase| phase == Phase::Decoding) {
            let Some(at) = self.find(request) else { continue };
            let limit = self.requests[at].limit();
            if let Some(seat) = self.seat_mut(request) {
                seat.ready = seat.planned < limit && seat.planned < seat.capacity();
            }
        }
        for request in self.in_line(|phase| phase == Phase::Decoding) {
            let Some(at) = self.find(request) else { continue };
            let limit = self.requests[at].limit();
            // It may have given its seat to one before it in line.
            let Some(seat) = self.requests[at].seat() else { continue };
            if seat.planned >= limit || seat.ready {
                continue;
            }
            let want = seat.planned + 1;
            if self.reach(draft, request, want)
                && let Some(seat) = self.seat_mut(request)
            {
                seat.ready = seat.planned < seat.capacity();
            }
        }
        for seat in self.requests.iter().filter_map(|r| r.seat()).filter(|s| s.decoding && s.ready)
        {
            draft.decode += 1;
            draft.context += u64::from(seat.planned);
        }
    }

    /// Prompts under way go on, as far as the step has room.
    fn prompts(&mut self, draft: &mut Draft) {
        draft.room = self.config.max_step_tokens.0.saturating_sub(draft.decode);
        let load = Load { decode: draft.decode, prefill: 0, context: draft.context };
        if self.requests.iter().any(|r| r.phase() == Phase::Decoding)
            && let Some(room) = self.cost.prefill_room(load, self.config.decode_budget)
        {
            draft.room = draft.room.min(room.max(CHUNK_LEAST));
        }
        draft.whole_room = draft.room;
        for request in self.in_line(|phase| phase == Phase::Prefilling) {
            let Some(at) = self.find(request) else { continue };
            let known = self.requests[at].known();
            let Some(planned) = self.requests[at].seat().map(|seat| seat.planned) else { continue };
            let size = self.chunk_size(draft, known - planned);
            if size == 0 || !self.reach(draft, request, planned + size) {
                continue;
            }
            let capacity = self.seat_mut(request).map_or(planned, |seat| seat.capacity());
            let tokens = capacity.min(planned + size) - planned;
            draft.room -= tokens;
            draft.chunks.push((request, tokens));
        }
    }

    fn chunk_size(&self, draft: &Draft, left: u32) -> u32 {
        let frugal = self.life.as_ref().is_some_and(|life| life.frugal);
        let cap = if frugal { BLOCK_TOKENS } else { u32::MAX };
        left.min(draft.room).min(self.config.max_chunk.0).min(cap)
    }

    /// Gets a running request blocks for `want` tokens, or for one more at least. Who is last in
    /// line gives way, unless blocks are on their way already.
    fn reach(&mut self, draft: &mut Draft, request: RequestId, want: u32) -> bool {
        loop {
            let (Some(at), Some(life)) = (self.find(request), &mut self.life) else { return true };
            let rank = self.requests[at].rank();
            let State::Seated(seat) = &mut self.requests[at].state else { return true };
            let (blocks, short) = life.extend(seat, want);
            if !blocks.is_empty() {
                life.ops.push(SlotOp::Extend { slot: seat.at.slot, blocks });
            }
            let Some(group) = short else { return true };
            if seat.capacity() > seat.planned {
                return true;
            }
            if life.arriving(group) > draft.claimed {
                draft.claimed += 1;
                return false;
            }
            let Some(victim) = self.last_behind(rank) else { return false };
            self.sacrifice(draft, victim);
        }
    }

    /// Who runs and is last in line, behind this place.
    fn last_behind(&self, rank: Rank) -> Option<RequestId> {
        let last = self.running().last().copied()?;
        let at = self.find(last)?;
        (self.requests[at].rank() > rank).then_some(last)
    }

    fn sacrifice(&mut self, draft: &mut Draft, victim: RequestId) {
        if let Some(seat) = self.seat_mut(victim)
            && seat.decoding
            && seat.ready
        {
            draft.decode = draft.decode.saturating_sub(1);
            draft.context = draft.context.saturating_sub(u64::from(seat.planned));
        }
        let given_up = draft.chunks.iter().filter(|(id, _)| *id == victim);
        draft.room += given_up.map(|(_, tokens)| tokens).sum::<u32>();
        draft.chunks.retain(|(id, _)| *id != victim);
        self.preempt(victim);
    }

    /// Lets in whoever is first in line, until one must wait.
    fn admissions(&mut self, draft: &mut Draft) {
        self.lonely = None;
        while let Some(first) = self.waiting().first().copied() {
            if let Err(wait) = self.admit(draft, first) {
                draft.short = matches!(wait, Wait::Blocks);
                self.lonely = matches!(wait, Wait::Alone).then_some(first);
                return;
            }
        }
    }

    fn admit(&mut self, draft: &mut Draft, request: RequestId) -> Result<(), Wait> {
        let (Some(at), Some(life)) = (self.find(request), &self.life) else {
            return Err(Wait::Else);
        };
        let r = &self.requests[at];
        let (rank, known, root) = (r.rank(), r.known(), r.submit.root);
        let left_outbox = self.said - self.outputs.len() as u64;
        let suspect = r.deaths >= 2;
        let alone = life.isolated || life.frugal || suspect;
        if r.uploaded > left_outbox {
            return Err(Wait::Else);
        }
        let elsewhere = self.beside.barred || (suspect && self.beside.running);
        if elsewhere || (alone && !self.running().is_empty()) {
            return Err(Wait::Alone);
        }
        if draft.room == 0 {
            return Err(Wait::Else);
        }
        if life.free.is_empty() {
            let arriving = life.slot_limbo.len() + life.closing.len();
            if arriving == 0
                && let Some(victim) = self.last_behind(rank)
            {
                self.sacrifice(draft, victim);
            }
            if self.life.as_ref().is_none_or(|life| life.free.is_empty()) {
                return Err(Wait::Else);
            }
        }
        if self.still_blocked(request, rank) {
            return Err(Wait::Blocks);
        }
        let tokens = self.requests[at].tokens();
        let caching = self.config.prefix_caching && !self.requests[at].tells_prompt();
        let most = if caching { (known - 1) / BLOCK_TOKENS } else { 0 };
        let hit = self.life.as_ref().map_or(0, |life| life.cache.hit(root, &tokens, most));
        let cached = hit * BLOCK_TOKENS;
        let left = known - cached;
        let fits = left <= draft.whole_room.min(self.config.max_chunk.0);
        let nearly = left > draft.room && draft.room <= draft.whole_room / 4;
        if !draft.chunks.is_empty() && fits && nearly && !self.requests[at].gave_way {
            self.requests[at].gave_way = true;
            return Err(Wait::Else);
        }
        self.make_room(draft, request, hit)?;
        self.seat(draft, request, hit)
    }

    /// Whether the first in line would find what it found before, so that it is not looked up.
    fn still_blocked(&self, request: RequestId, rank: Rank) -> bool {
        let (Some(b), Some(life)) = (self.blocked, &self.life) else { return false };
        let mintable = life.cache.mintable(b.group);
        if b.request != request || mintable >= b.need || self.running().len() < b.running {
            return false;
        }
        life.arriving(b.group) >= b.need - mintable || self.last_behind(rank).is_none()
    }

    /// All that is known of the request must have a place, beside what was promised to others:
    /// the rest of prompts under way, and one more block for everybody who runs.
    fn make_room(&mut self, draft: &mut Draft, request: RequestId, hit: u32) -> Result<(), Wait> {
        self.blocked = None;
        let groups = self.life.as_ref().map_or(0, |life| life.cache.groups());
        for group in 0..groups {
            loop {
                let (Some(at), Some(life)) = (self.find(request), &self.life) else {
                    return Err(Wait::Else);
                };
                let r = &self.requests[at];
                let first = super::cache::first_read(life.cache.kind(group), hit * BLOCK_TOKENS);
                let own =
                    life.cache.most_held(group, r.known()).saturating_sub(hit - hit.min(first));
                let spare = life.cache.taken_by(group, r.submit.root, &r.tokens(), hit);
                let prefilling = self.requests.iter().filter(|r| r.phase() == Phase::Prefilling);
                let rest = |r: &super::Req| {
                    let held = r.seat().map_or(0, |seat| seat.tables[group].blocks.len() as u32);
                    life.cache.most_held(group, r.known()).saturating_sub(held)
                };
                let promised = prefilling.map(rest).sum::<u32>() + self.running().len() as u32;
                let need = own + spare + promised;
                let mintable = life.cache.mintable(group);
                if mintable >= need {
                    break;
                }
                let on_its_way = life.arriving(group) >= need - mintable;
                let victim = if on_its_way { None } else { self.last_behind(r.rank()) };
                let Some(victim) = victim else {
                    let running = self.running().len();
                    self.blocked = Some(Blocked { request, group, need, running });
                    return Err(Wait::Blocks);
                };
                self.sacrifice(draft, victim);
            }
        }
        Ok(())
    }

    fn seat(&mut self, draft: &mut Draft, request: RequestId, hit: u32) -> Result<(), Wait> {
        let cached = hit * BLOCK_TOKENS;
        let Some(at) = self.find(request) else { return Err(Wait::Else) };
        let (known, tokens) = (self.requests[at].known(), self.requests[at].tokens());
        let size = self.chunk_size(draft, known - cached);
        let r = &mut self.requests[at];
        let Some(life) = &mut self.life else { return Err(Wait::Else) };
        let Some(slot) = life.free.pop() else { return Err(Wait::Else) };
        life.generations[slot as usize] += 1;
        let generation = SlotGeneration(life.generations[slot as usize]);
        let taken = life.cache.take_hit(r.submit.root, &tokens, hit, life.frugal);
        life.ops.append(&mut life.cache.copies);
        let Ok(taken) = taken else {
            life.free.push(slot);
            return Err(Wait::Blocks);
        };
        let mut seat = Seat {
            at: SlotRef { slot: SlotId(slot), generation },
            tables: taken,
            computed: cached,
            planned: cached,
            decoding: false,
            in_set: false,
            ready: false,
        };
        let shared = (0..).map(GroupId).zip(&seat.tables).map(|(group, table)| GroupTable {
            group,
            skipped: table.skipped,
            blocks: table.blocks.iter().map(|(block, _)| BlockId(*block)).collect(),
        });
        let tables = shared.collect();
        let (blocks, short) = life.extend(&mut seat, cached + size);
        if short.is_some() && seat.capacity() <= cached {
            life.cache.give_all_back(&seat.tables);
            life.free.push(slot);
            return Err(Wait::Blocks);
        }
        let run = seat.capacity().min(cached + size) - cached;
        life.ops.push(SlotOp::Admit(Box::new(Admit {
            slot: seat.at,
            request,
            known: Tokens(known),
            prompt: Tokens(r.submit.prompt.len() as u32),
            cached: Tokens(cached),
            tables,
            sampling: r.submit.sampling.clone(),
            prompt_logprobs: r.submit.prompt_logprobs.filter(|_| r.tells_prompt()),
        })));
        if !blocks.is_empty() {
            life.ops.push(SlotOp::Extend { slot: SlotId(slot), blocks });
        }
        life.isolated |= r.deaths >= 2;
        let first_time = r.cached.is_none();
        r.cached = r.cached.or(Some(cached));
        r.state = State::Seated(seat);
        draft.room -= run;
        draft.chunks.push((request, run));
        if first_time {
            self.say(Output::Started { request, cached: Tokens(cached) });
        }
        Ok(())
    }

    /// Everything decided becomes a step.
    fn launch(&mut self, draft: &Draft, now: Timestamp) -> Option<StepPlan> {
        let life = self.life.as_mut()?;
        life.cache.launched += 1;
        let seq = life.cache.launched;
        let (mut chunks, mut samplers, mut prefill) = (Vec::new(), Vec::new(), Vec::new());
        let mut decode = DecodeDelta::default();
        let mut load = Load::default();
        for r in &mut self.requests {
            let request = r.id();
            let State::Seated(seat) = &mut r.state else { continue };
            if !seat.decoding {
                continue;
            }
            if seat.ready {
                seat.planned += 1;
                samplers.push((request, seat.at));
                load.decode += 1;
                load.context += u64::from(seat.planned);
                decode.join.extend((!seat.in_set).then_some(seat.at.slot));
            } else {
                decode.leave.extend(seat.in_set.then_some(seat.at.slot));
            }
            seat.in_set = seat.ready;
        }
        for (request, tokens) in &draft.chunks {
            let Some(r) = self.requests.iter_mut().find(|r| r.id() == *request) else { continue };
            let (known, limit) = (r.known(), r.limit());
            let State::Seated(seat) = &mut r.state else { continue };
            seat.planned += tokens;
            load.prefill += tokens;
            chunks.push((*request, seat.at, seat.planned));
            let sample = seat.planned == known;
            let (slot, tokens) = (seat.at.slot, Tokens(*tokens));
            prefill.push(PrefillRun { slot, tokens, sample });
            if sample {
                samplers.push((*request, seat.at));
                seat.decoding = true;
                seat.in_set = known < limit;
                decode.join.extend(seat.in_set.then_some(slot));
            }
        }
        if life.flights.is_empty() {
            life.head_since = now;
        }
        life.flights.push_back(Flight { seq, chunks, samplers, load });
        let tokens = load.decode + load.prefill;
        let ops = core::mem::take(&mut life.ops);
        Some(StepPlan {
            seq: StepSeq(seq),
            incarnation: life.incarnation,
            bucket: Tokens(padded(tokens)),
            shard_tokens: vec![Tokens(tokens)],
            sections: vec![Section { ops, prefill, decode }],
        })
    }
}

impl Life {
    /// Mints until a seat has blocks for `want` tokens. Returns what was minted and, where it was
    /// not enough, the group that is short. Copies of what it took the place of come first.
    fn extend(&mut self, seat: &mut Seat, want: u32) -> (Vec<WriteSlot>, Option<usize>) {
        let extended = self.mint_for(seat, want);
        self.ops.append(&mut self.cache.copies);
        extended
    }

    fn mint_for(&mut self, seat: &mut Seat, want: u32) -> (Vec<WriteSlot>, Option<usize>) {
        let mut minted = Vec::new();
        for logical in seat.capacity() / BLOCK_TOKENS..want.div_ceil(BLOCK_TOKENS) {
            for (group, table) in seat.tables.iter_mut().enumerate() {
                if table.end() > logical {
                    continue;
                }
                let Some(block) = self.cache.mint(group, self.frugal) else {
                    return (minted, Some(group));
                };
                table.blocks.push((block, false));
                minted.push(WriteSlot { group: GroupId(group as u8), block: BlockId(block) });
            }
        }
        (minted, None)
    }
}

/// The smallest size that a step of so many tokens is padded to.
pub(super) fn padded(tokens: u32) -> u32 {
    let sizes = (0..30).flat_map(|power| MANTISSAS.map(|m| m << power));
    let sizes = sizes.filter(|size| *size > 8);
    if tokens <= 8 { tokens } else { sizes.min_by_key(|s| (*s < tokens, *s)).unwrap_or(tokens) }
}
