//! One step, composed and launched.
//!
//! Decoding comes first, then running prefills, then the queue, each in order of rank. Composing
//! changes tables and seats but launches nothing: only `launch` numbers a step and moves requests
//! along. Invariant: a plan names every slot it runs once, and the number of tokens is bounded by
//! `max_step_tokens`.

use crate::life::{Flight, Life};
use crate::policy::cost::Load;
use crate::report::{PlanReport, Waits};
use crate::request::Live;
use crate::scheduler::{Scheduler, count};
use crate::slab::Key;
use ids::{Blocks, Incarnation, StepSeq, Timestamp, Tokens};
use step::{DecodeDelta, PrefillRun, Section};

/// Prompt tokens from which on a step takes far longer than planning the next one.
const LONG: u32 = 512;

/// A prompt chunk that the step will run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chunk {
    pub(crate) key: Key,
    pub(crate) tokens: Tokens,
}

/// A shard's part of a step.
#[derive(Debug)]
pub(crate) struct Part {
    /// As the shard counts.
    pub(crate) seq: StepSeq,
    pub(crate) incarnation: Incarnation,
    pub(crate) tokens: Tokens,
    pub(crate) section: Section,
    pub(crate) report: PlanReport,
}

/// A step being composed.
#[derive(Debug, Default)]
pub(crate) struct Draft {
    pub(crate) chunks: Vec<Chunk>,
    /// Decoding slots that can run, and the context they attend to.
    pub(crate) load: Load,
    /// Prompt tokens that the step still takes, and how many it took at first.
    pub(crate) room: Tokens,
    pub(crate) whole_room: Tokens,
    /// Whether the decode budget, not the step's size, set the room.
    pub(crate) by_budget: bool,
    /// When it is composed.
    pub(crate) now: Timestamp,
    /// Blocks on their way that a stalled request counts on.
    pub(crate) claimed: Blocks,
    pub(crate) report: PlanReport,
}

impl Draft {
    fn is_idle(&self) -> bool {
        self.load.decode == 0 && self.chunks.is_empty()
    }
}

impl Scheduler {
    pub(crate) fn plan(&mut self, life: &mut Life, now: Timestamp) -> Option<Part> {
        if !has_room_ahead(life, self.config.depth) {
            return None;
        }
        life.slice = self.config.release_slice;
        life.drain();
        let mut draft = self.compose(life, now);
        if draft.is_idle() && life.flights.is_empty() {
            if !life.draining.is_empty() {
                // Nothing else to do: there is no step to keep short.
                life.slice = u32::MAX;
                life.drain();
                draft = self.compose(life, now);
            }
            let short = matches!(self.head, Some((_, Waits::Blocks { .. })));
            if draft.is_idle() && (short || !life.running.is_empty()) {
                self.unjam(life);
                draft = self.compose(life, now);
            }
        }
        if draft.is_idle() {
            life.withdraw_admissions();
            return None;
        }
        Some(self.launch(life, draft, now))
    }

    fn compose(&mut self, life: &mut Life, now: Timestamp) -> Draft {
        let mut draft = Draft { now, ..Draft::default() };
        self.stalls.clear();
        self.plan_decodes(life, &mut draft);
        self.set_room(life, &mut draft);
        self.plan_prefills(life, &mut draft);
        self.admit_waiting(life, &mut draft);
        draft
    }

    /// Nothing runs, nothing is in flight, and still blocks are short: those of one group, held or
    /// cached for the first in line itself, keep super-blocks from another. Start over with one
    /// request and an empty pool, which `Refusal::CacheTooSmall` promised is enough.
    fn unjam(&mut self, life: &mut Life) {
        self.counters.purges += 1;
        let seated: Vec<Key> = life.running.values().copied().collect();
        for key in seated {
            self.preempt(life, key);
        }
        life.slice = u32::MAX;
        life.drain();
        life.cache.purge();
        life.copy_first(&mut self.counters);
        life.frugal = true;
    }

    fn launch(&mut self, life: &mut Life, draft: Draft, now: Timestamp) -> Part {
        let mut flight = life.spare.pop().unwrap_or_default();
        flight.samplers.clear();
        flight.chunks.clear();
        flight.seq = life.cache.launch();
        let mut section = self.spare.section();
        core::mem::swap(&mut section.ops, &mut life.ops);
        core::mem::swap(&mut section.decode.leave, &mut life.leaving);
        let mut load = self.launch_decodes(life, &mut flight, &mut section.decode);
        let mut prefill_tokens = Tokens::ZERO;
        for chunk in &draft.chunks {
            prefill_tokens += chunk.tokens;
            section.prefill.extend(self.launch_chunk(
                life,
                *chunk,
                &mut flight,
                &mut section.decode,
            ));
        }
        load.prefill = prefill_tokens.0;
        flight.load = load;
        let tokens = Tokens(load.decode) + prefill_tokens;
        let report = PlanReport {
            seq: flight.seq,
            ahead: count(life.flights.len()),
            decode: load.decode,
            chunks: count(draft.chunks.len()),
            prefill_tokens,
            stalled: count(self.stalls.len()),
            running: count(life.running.len()),
            waiting: count(self.line.len().0),
            head: self.head,
            predicted: self.cost.predict(load),
            cache_usage: life.cache.usage(),
            ..draft.report
        };
        let (seq, incarnation) = (flight.seq, life.incarnation);
        if life.flights.is_empty() {
            life.head_since = now;
        }
        life.flights.push_back(flight);
        self.counters.steps += 1;
        Part { seq, incarnation, tokens, section, report }
    }

    fn launch_chunk(
        &mut self,
        life: &mut Life,
        chunk: Chunk,
        flight: &mut Flight,
        decode: &mut DecodeDelta,
    ) -> Option<PrefillRun> {
        let (job, seat) = self.requests.get_mut(chunk.key)?.seated()?;
        seat.planned += chunk.tokens;
        let at = seat.slot.at();
        flight.chunks.push((at, seat.planned));
        let sample = seat.planned == job.known();
        if sample {
            flight.samplers.push(at);
            let (rank, goes_on) = (job.rank, seat.planned < job.limit());
            match self.requests.take(chunk.key) {
                Some(Live::Prefilling(request)) => {
                    let mut request = request.decode(life.decoding.len());
                    request.state.in_set = goes_on;
                    decode.join.extend(goes_on.then_some(at.slot));
                    life.prefilling.remove(&rank);
                    life.decoding.push(chunk.key);
                    self.requests.put(chunk.key, Live::Decoding(request));
                }
                Some(other) => self.requests.put(chunk.key, other),
                None => {}
            }
        }
        Some(PrefillRun { slot: at.slot, tokens: chunk.tokens, sample })
    }
}

/// Whether a step may be planned behind those in flight.
pub(crate) fn has_room_ahead(life: &Life, depth: u32) -> bool {
    let ahead = match life.frugal {
        true => 0,
        // Behind a long step there is time to plan when the one in front of it has ended, and whoever
        // comes until then is not late for it.
        false if life.flights.iter().skip(1).any(|flight| flight.load.prefill >= LONG) => {
            depth.min(1)
        }
        false => depth,
    };
    !life.condemned && count(life.flights.len()) <= ahead
}
