//! Steps on their way: a plan is applied and enqueued, later its tokens are collected.
//!
//! The order is first in, first out. It decides nothing of what runs. Invariants: the slots are as
//! all enqueued plans left them; a token that the host does not know yet is pending in its life, and
//! where the host must draw, nothing is enqueued behind the step until it has.

#[cfg(test)]
mod tests;

use crate::batch::{Purpose, Wanted};
use crate::executor::{Collected, Executor, TableView, Tile};
use crate::flight::{Flight, MOST_FLIGHTS};
use crate::sampler::{Drawn, Sampler, described_on_device, drawn_on_device};
use crate::slots::Slots;
use crate::standing::Standing;
use crate::{PlanError, StepError};
use ids::{Incarnation, RequestId, SlotGeneration, SlotId, StepSeq, TokenId, Tokens};
use std::collections::VecDeque;
use std::time::Instant;
use step::{Logprobs, Outcome, PromptLogprobs, Sampled, StepPlan, StepTiming};

/// Where a device's failure shows that was enqueued without complaint.
const PROGRAM: &str = "the model program";

/// What exists once the scheduler has said how memory is carved.
pub(crate) struct Steps {
    pub(crate) incarnation: Incarnation,
    pub(crate) slots: Slots,
    last: StepSeq,
    max_step_tokens: usize,
    vocab: usize,
    sampler: Sampler,
    /// Oldest first.
    flights: VecDeque<Flight>,
    spare: Vec<Flight>,
    standing: Standing,
    /// When the last outcome was complete: the next step's time begins then at the earliest.
    collected: Instant,
}

impl Steps {
    /// For steps of up to `tokens` tokens.
    pub(crate) fn new(
        incarnation: Incarnation,
        slots: Slots,
        (tokens, max_slots): (usize, usize),
        vocab: usize,
        standing: Standing,
    ) -> Self {
        let flight = |_| Flight::with_capacity(tokens, max_slots);
        Self {
            incarnation,
            slots,
            last: StepSeq::ZERO,
            max_step_tokens: tokens,
            vocab,
            sampler: Sampler::new(vocab),
            flights: VecDeque::with_capacity(MOST_FLIGHTS),
            spare: (0..MOST_FLIGHTS).map(flight).collect(),
            standing,
            collected: Instant::now(),
        }
    }

    /// Steps enqueued and not collected.
    pub(crate) fn in_flight(&self) -> usize {
        self.flights.len()
    }

    /// Whether another step may be enqueued now.
    pub(crate) fn accepts(&self) -> bool {
        self.flights.len() < MOST_FLIGHTS && self.flights.iter().all(|flight| flight.ahead)
    }

    /// Whether the oldest step can be collected without waiting for a device.
    pub(crate) fn ready(&self, backend: &impl Executor) -> Result<bool, StepError> {
        match self.flights.front() {
            None => Ok(false),
            Some(flight) if !flight.ahead || !flight.runs => Ok(true),
            Some(flight) => backend.ready().map_err(|source| flight.failed(PROGRAM, source)),
        }
    }

    /// Applies a plan and enqueues its step.
    pub(crate) fn enqueue(
        &mut self,
        backend: &mut impl Executor,
        plan: &StepPlan,
    ) -> Result<(), StepError> {
        if plan.seq <= self.last {
            return Err(PlanError::Sequence { got: plan.seq, last: self.last }.into());
        }
        let section = self.standing.section(plan)?;
        let free = if self.accepts() { self.spare.pop() } else { None };
        let Some(mut flight) = free else {
            return Err(PlanError::TooFarAhead { got: plan.seq, last: self.last }.into());
        };
        self.last = plan.seq;
        flight.begin(plan);
        self.slots.apply(section)?;
        let copies = self.slots.copies();
        if !copies.is_empty()
            && let Err(source) = backend.copy_blocks(copies)
        {
            return Err(self.blame(backend, &flight, source));
        }
        flight.batch.fill(&mut self.slots, section, self.max_step_tokens)?;
        flight.fill_draws(&mut self.slots)?;
        flight.ahead = true;
        flight.runs = self.standing.rows(plan, self.max_step_tokens, &mut flight.batch)?;
        if flight.runs {
            let tables = TableView::new(&self.slots);
            match backend.enqueue(&flight.batch, &tables, &flight.draws) {
                Ok(ahead) => flight.ahead = ahead,
                Err(source) => return Err(self.blame(backend, &flight, source)),
            }
        }
        if flight.ahead {
            for wanted in &flight.batch.wanted {
                self.slots.life_mut(wanted.slot)?.await_token();
            }
        }
        self.flights.push_back(flight);
        Ok(())
    }

    /// Whose failure it is that enqueueing `flight` met: a device says what went wrong before to
    /// whoever calls it next.
    fn blame<E: Executor>(&self, backend: &mut E, flight: &Flight, source: E::Error) -> StepError {
        for older in self.flights.iter().filter(|older| older.runs) {
            if let Err(source) = backend.collect() {
                return older.failed(PROGRAM, source);
            }
        }
        flight.failed("enqueueing", source)
    }

    /// Waits for the oldest step and makes its outcome; `None` where there is none.
    pub(crate) fn collect(
        &mut self,
        backend: &mut impl Executor,
    ) -> Result<Option<Outcome>, StepError> {
        let Some(flight) = self.flights.pop_front() else { return Ok(None) };
        let mut outcome = Outcome {
            seq: flight.seq,
            incarnation: flight.incarnation,
            sampled: Vec::with_capacity(flight.batch.wanted.len()),
            prompt_logprobs: Vec::new(),
            timing: StepTiming {
                tokens: flight.batch.ids.len() as u32,
                prefill_tokens: flight.batch.prefill_tokens as u32,
                host_draws: !flight.ahead && !flight.batch.wanted.is_empty(),
                ..StepTiming::default()
            },
            digest: 0,
        };
        if !flight.ahead {
            self.finish(backend, &flight, &mut outcome)?;
        }
        if flight.runs {
            let collected = backend.collect().map_err(|source| flight.failed(PROGRAM, source))?;
            outcome.timing.model_ns = collected.time.run_ns;
            outcome.timing.idle_ns = collected.time.idle_ns;
            outcome.timing.launches = collected.time.launches;
            outcome.timing.graphs = collected.time.graphs;
            outcome.timing.uncaptured = collected.time.uncaptured;
            if flight.ahead {
                self.settle(&flight, &collected, &mut outcome);
            }
        }
        outcome.digest = flight.digest.with_sampled(&outcome.sampled);
        let now = Instant::now();
        let began = flight.began.max(self.collected);
        outcome.timing.total_ns = now.saturating_duration_since(began).as_nanos() as u64;
        self.collected = now;
        self.spare.push(flight);
        Ok(Some(outcome))
    }

    /// Takes the tokens that a device drew.
    fn settle(&mut self, flight: &Flight, collected: &Collected<'_>, outcome: &mut Outcome) {
        let rows = flight.batch.wanted.iter().zip(&flight.lives);
        let drawn = collected.tokens.iter().zip(collected.faults);
        for ((wanted, generation), (token, left)) in rows.zip(drawn) {
            let sampled = sampled(wanted.slot, *generation, drawn_on_device(*token, *left));
            // A later plan may have retired the slot, or given it to another request.
            if let Some(life) = self.slots.life_of(wanted.slot, *generation) {
                life.settle(sampled.token);
            }
            outcome.sampled.push(sampled);
        }
    }

    /// Logits of the wanted rows in tiles, and what each is wanted for.
    fn finish(
        &mut self,
        backend: &mut impl Executor,
        flight: &Flight,
        outcome: &mut Outcome,
    ) -> Result<(), StepError> {
        let most = backend.tile(&flight.draws);
        for first in (0..flight.batch.wanted.len()).step_by(most) {
            let range = first..(first + most).min(flight.batch.wanted.len());
            let draws = &flight.draws[range.clone()];
            let Tile { logits, drawn, described, described_row } = backend
                .finish(&flight.batch, range.clone(), draws)
                .map_err(|source| flight.failed("logits and draws", source))?;
            let Self { slots, sampler, vocab, .. } = self;
            let (tokens, faults) = drawn.split_at(drawn.len() / 2);
            let tile = flight.batch.wanted[range.clone()].iter().zip(&flight.lives[range]);
            for (at, (wanted, generation)) in tile.enumerate() {
                let Wanted { slot, purpose, .. } = *wanted;
                let life = slots.life_mut(slot)?;
                // Empty where the row was drawn on the device.
                let row = logits.get_mut(at * *vocab..(at + 1) * *vocab).unwrap_or_default();
                match purpose {
                    Purpose::Prompt { position } => {
                        // Nothing is described where the executor draws nothing.
                        let there = draws[at].filter(|_| !described.is_empty());
                        let entry = there.and_then(|draw| {
                            let row = &described[at * described_row..][..described_row];
                            described_on_device(row, draw.listed, *vocab)
                        });
                        let entry = entry.unwrap_or_else(|| sampler.describe(row, life, position));
                        push_prompt(&mut outcome.prompt_logprobs, life.request, position, entry);
                    }
                    Purpose::Sample => {
                        let drawn = match (draws[at], tokens.get(at), faults.get(at)) {
                            (Some(draw), Some(token), Some(left)) => {
                                let mut drawn = drawn_on_device(*token, *left);
                                if draw.describes() && drawn.token.is_ok() {
                                    let row = &described[at * described_row..][..described_row];
                                    drawn.logprobs = described_on_device(row, draw.listed, *vocab);
                                }
                                drawn
                            }
                            _ => sampler.draw(row, life),
                        };
                        let sampled = sampled(slot, *generation, drawn);
                        life.accept(sampled.token);
                        outcome.sampled.push(sampled);
                    }
                }
            }
        }
        Ok(())
    }
}

/// What the scheduler hears of a row; 0 stands for a token that there is none of.
fn sampled(slot: SlotId, generation: SlotGeneration, drawn: Drawn) -> Sampled {
    let (token, fault) = match drawn.token {
        Ok(token) => (token, None),
        Err(fault) => (TokenId(0), Some(fault)),
    };
    Sampled { slot, generation, token, fault, logprobs: drawn.logprobs.map(Box::new) }
}

/// Appends an entry to its request's part, or begins one.
fn push_prompt(
    parts: &mut Vec<PromptLogprobs>,
    request: RequestId,
    position: u32,
    entry: Logprobs,
) {
    match parts.last_mut().filter(|part| part.request == request) {
        Some(part) => part.entries.push(entry),
        None => {
            let first = Tokens(position);
            parts.push(PromptLogprobs { request, first, entries: vec![entry] });
        }
    }
}
