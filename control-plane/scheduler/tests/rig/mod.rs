//! The scheduler with its journal and a worker that answers each step after a fixed time, on a clock
//! that only the rig moves.

#![allow(dead_code, reason = "each test file uses its part of this module")]

use ids::{
    Bytes, GroupId, HashKey, Incarnation, RequestId, ShardId, SlotId, Timestamp, TokenId, Tokens,
};
use scheduler::{Config, Event, History, Journal, Output, Scheduler, Submit, WorkerReady};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use step::{
    Carving, GroupKind, GroupSpec, Outcome, Sampled, SlotOp, SlotRef, StepPlan, StepTiming,
};

/// How long a step takes the worker.
pub(crate) const STEP: Duration = Duration::from_millis(10);

/// When every request's client stops waiting: later than any test but those of it.
const DEADLINE: Timestamp = Timestamp(1 << 50);

pub(crate) struct Rig {
    pub(crate) scheduler: Scheduler,
    pub(crate) journal: Journal,
    pub(crate) now: Timestamp,
    /// When each request ended, as its client saw it.
    pub(crate) ended: BTreeMap<RequestId, Timestamp>,
    /// What ends requests submitted from now on.
    pub(crate) stop_tokens: Vec<TokenId>,
    /// What was submitted.
    pub(crate) submits: Vec<Submit>,
    /// Output tokens of each.
    pub(crate) tokens: BTreeMap<RequestId, u32>,
    life: Incarnation,
    generations: BTreeMap<SlotId, SlotRef>,
    decoding: BTreeMap<SlotId, SlotRef>,
    due: VecDeque<(Timestamp, Outcome)>,
    root: ids::BlockHash,
}

impl Rig {
    /// `slots` rows; prompts run in chunks of 128 tokens, and nothing is found in the cache.
    pub(crate) fn new(slots: u32, bytes: usize) -> Self {
        let key = HashKey::derive("rig", b"");
        let config = Config {
            max_running: slots,
            max_step_tokens: Tokens(128),
            max_chunk: Tokens(128),
            prefix_caching: false,
            ..Config::with_key(key.clone())
        };
        Self {
            scheduler: Scheduler::new(config).expect("limits agree"),
            journal: Journal::new(bytes, slots, 1),
            now: Timestamp::ZERO,
            ended: BTreeMap::new(),
            stop_tokens: Vec::new(),
            submits: Vec::new(),
            tokens: BTreeMap::new(),
            life: Incarnation(0),
            generations: BTreeMap::new(),
            decoding: BTreeMap::new(),
            due: VecDeque::new(),
            root: key.root(b""),
        }
    }

    /// A worker whose cache holds `blocks` blocks.
    pub(crate) fn ready(&mut self, blocks: u32) {
        self.life = self.life.next();
        let spec = GroupSpec { group: GroupId(0), kind: GroupKind::Full, block_bytes: Bytes(64) };
        let bytes = Bytes(64 * u64::from(blocks));
        let carving: Carving = kv_cache::carve(&[spec], bytes, Bytes(64)).expect("carves");
        self.journal.ready(self.now, self.life);
        let ready = WorkerReady { incarnation: self.life, groups: vec![spec], carving };
        self.turn(Some(Event::WorkerReady(Box::new(ready))));
    }

    pub(crate) fn lose(&mut self) {
        self.due.clear();
        self.generations.clear();
        self.decoding.clear();
        self.journal.lost(self.now);
        self.turn(Some(Event::WorkerLost(self.life)));
    }

    pub(crate) fn submit(&mut self, request: u64, prompt: u32, max_tokens: u32) {
        let first = TokenId(request as u32 + 1000);
        let prompt = (0..prompt).map(TokenId).map(|t| if t.0 == 0 { first } else { t });
        let submit = Submit {
            request: RequestId(request),
            prompt: prompt.collect(),
            prompt_hashes: Arc::default(),
            root: self.root,
            sampling: Arc::default(),
            max_tokens: Tokens(max_tokens),
            end_tokens: Arc::default(),
            ignore_eos: true,
            stop_tokens: self.stop_tokens.as_slice().into(),
            prompt_logprobs: None,
            priority: 0,
            tenant: ids::TenantId(0),
            deadline: Some(DEADLINE),
            arrival: self.now,
        };
        self.journal.submitted(&submit);
        self.submits.push(submit.clone());
        self.turn(Some(Event::Submit(Box::new(submit))));
    }

    /// What the driver does between two waits.
    pub(crate) fn turn(&mut self, event: Option<Event>) {
        if let Some(event) = event {
            self.scheduler.handle(self.now, event);
        }
        loop {
            self.drain();
            let Some(planned) = self.scheduler.plan_step(self.now) else { break };
            self.journal.looked(ShardId(0), self.scheduler.first_in_line());
            self.journal.planned(self.now, &planned, self.scheduler.stalls());
            self.drain();
            self.journal.sent(self.now, planned.plan.seq);
            self.carry_out(&planned.plan);
        }
        self.journal.looked(ShardId(0), self.scheduler.first_in_line());
        self.drain();
        self.journal.delivered(self.now);
    }

    fn drain(&mut self) {
        while let Some(output) = self.scheduler.poll_output() {
            self.journal.said(self.now, &output);
            match output {
                Output::Token { request, .. } => *self.tokens.entry(request).or_default() += 1,
                Output::Finished { request, .. } | Output::Refused { request, .. } => {
                    self.ended.insert(request, self.now);
                }
                _ => {}
            }
        }
    }

    fn carry_out(&mut self, plan: &StepPlan) {
        let section = &plan.sections[0];
        for op in &section.ops {
            match op {
                SlotOp::Admit(admit) => {
                    self.generations.insert(admit.slot.slot, admit.slot);
                }
                SlotOp::Retire { slot } => {
                    self.decoding.remove(slot);
                }
                SlotOp::Extend { .. }
                | SlotOp::Trim { .. }
                | SlotOp::Store { .. }
                | SlotOp::Load { .. } => {}
            }
        }
        let (join, leave) = (&section.decode.join, &section.decode.leave);
        self.decoding.retain(|slot, _| !leave.contains(slot));
        self.decoding.extend(join.iter().map(|slot| (*slot, self.generations[slot])));
        let chunk = |slot: &SlotId| section.prefill.iter().find(|run| run.slot == *slot);
        let mut draw: Vec<SlotRef> =
            self.decoding.values().filter(|at| chunk(&at.slot).is_none()).copied().collect();
        let drawn = section.prefill.iter().filter(|run| run.sample);
        draw.extend(drawn.map(|run| self.generations[&run.slot]));
        let sampled = draw.iter().map(|at| Sampled {
            slot: at.slot,
            generation: at.generation,
            token: TokenId(1),
            fault: None,
            logprobs: None,
        });
        let begins = self.due.back().map_or(self.now, |(at, _)| *at);
        let timing = StepTiming {
            total_ns: STEP.as_nanos() as u64,
            model_ns: STEP.as_nanos() as u64 / 2,
            ..StepTiming::default()
        };
        let outcome = Outcome {
            seq: plan.seq,
            incarnation: plan.incarnation,
            sampled: sampled.collect(),
            prompt_logprobs: Vec::new(),
            timing,
            digest: 0,
        };
        self.due.push_back((begins.max(self.now).after(STEP), outcome));
    }

    /// Lets the deadlines of all requests pass.
    pub(crate) fn expire(&mut self) {
        self.now = DEADLINE;
        self.turn(Some(Event::Wakeup));
    }

    /// Lets the worker answer one step; false when none is under way.
    pub(crate) fn step(&mut self) -> bool {
        let Some((at, outcome)) = self.due.pop_front() else { return false };
        self.now = self.now.max(at);
        self.journal.answered(self.now, outcome.incarnation, outcome.seq, &outcome.timing);
        self.turn(Some(Event::Outcome(outcome)));
        true
    }

    pub(crate) fn settle(&mut self) {
        while self.step() {}
    }

    pub(crate) fn history(&self, request: u64) -> History {
        self.journal.read(self.now).history(RequestId(request)).expect("is kept")
    }
}

/// A story whose spans touch and cover it; their kinds with what is waited for, and milliseconds.
pub(crate) fn parts(history: &History) -> Vec<(&'static str, &'static str, u128)> {
    let mut at = history.arrival;
    for span in &history.spans {
        assert!(span.from == at && span.to >= at, "a hole: {:?}", history.spans);
        at = span.to;
    }
    if let Some(end) = history.end {
        assert_eq!(at, end, "to the end: {:?}", history.spans);
    }
    let part = |span: &scheduler::Span| {
        let word = span.part.waits().map_or("", |(_, word)| word);
        (span.part.label(), word, span.to.since(span.from).as_millis())
    };
    history.spans.iter().map(part).collect()
}
