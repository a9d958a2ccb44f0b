//! Steps over an executor that remembers what it was given and draws from nothing else: a token that
//! came from the wrong slot, life or step changes every token after it.

use super::*;
use crate::batch::Batch;
use crate::copies::BlockCopy;
use crate::executor::{DeviceTime, RowDraw};
use crate::tables::Carver;
use core::ops::Range;
use device::cuda::CudaError;
use ids::{BlockId, Bytes, GroupId};
use ops::tokens::OF_SLOT;
use std::collections::BTreeMap;
use std::sync::Arc;
use step::{Admit, Carving, DecodeDelta, GroupKind, GroupSpec, GroupTable, PrefillRun};
use step::{Sampling, Section, SlotOp, SlotRef, Upload};

const LIFE: Incarnation = Incarnation(3);
const VOCAB: u32 = 1000;

/// A device whose cache holds tokens, and which is done with a step when it is asked.
#[derive(Default)]
struct Memory {
    kv: BTreeMap<(SlotId, u32), u32>,
    last: BTreeMap<u32, u32>,
    /// Tokens of steps on their way.
    flying: VecDeque<Vec<u32>>,
    collected: Vec<u32>,
    faults: Vec<u32>,
    logits: Vec<f32>,
    wanted: Vec<u32>,
    /// The step that fails, counted from 0, and steps so far.
    fails: Option<usize>,
    steps: usize,
}

const BROKEN: CudaError = CudaError::NoDriver;

impl Executor for Memory {
    type Error = CudaError;

    fn copy_blocks(&mut self, _: &[BlockCopy]) -> Result<(), CudaError> {
        // No plan here asks for any.
        Err(BROKEN)
    }

    fn enqueue(
        &mut self,
        batch: &Batch,
        _: &TableView<'_>,
        draws: &[Option<RowDraw>],
    ) -> Result<bool, CudaError> {
        for run in &batch.runs {
            for row in run.start..run.start + run.len {
                let id = batch.ids[row];
                let token = if id & OF_SLOT == 0 { id } else { self.last[&(id & !OF_SLOT)] };
                self.kv.insert((run.slot, batch.positions[row]), token);
            }
        }
        let drawn = batch.wanted.iter().map(|wanted| {
            let until = batch.positions[wanted.row as usize];
            let tokens = (0..=until).map(|at| self.kv[&(wanted.slot, at)]);
            tokens.fold(7_u32, |sum, token| sum.wrapping_mul(31).wrapping_add(token)) % VOCAB
        });
        let drawn: Vec<u32> = drawn.collect();
        let here = draws.iter().all(|draw| draw.is_some_and(|draw| !draw.describes()));
        if here {
            let kept = batch.wanted.iter().map(|wanted| wanted.slot.0).zip(drawn.iter().copied());
            self.last.extend(kept);
        }
        self.wanted.clone_from(&drawn);
        self.flying.push_back(if here { drawn } else { Vec::new() });
        Ok(here)
    }

    fn finish(
        &mut self,
        _: &Batch,
        wanted: Range<usize>,
        _: &[Option<RowDraw>],
    ) -> Result<Tile<'_>, CudaError> {
        self.logits = vec![0.0; wanted.len() * VOCAB as usize];
        for (row, token) in self.wanted[wanted].iter().enumerate() {
            self.logits[row * VOCAB as usize + *token as usize] = 1.0;
        }
        Ok(Tile { logits: &mut self.logits, drawn: &[], described: &[], described_row: 0 })
    }

    fn ready(&self) -> Result<bool, CudaError> {
        Ok(true)
    }

    fn collect(&mut self) -> Result<Collected<'_>, CudaError> {
        if self.fails == Some(self.steps) {
            return Err(BROKEN);
        }
        self.steps += 1;
        self.collected = self.flying.pop_front().expect("a step in flight");
        self.faults = vec![0; self.collected.len()];
        let time = DeviceTime::default();
        Ok(Collected { tokens: &self.collected, faults: &self.faults, time })
    }

    fn tile(&self, _: &[Option<RowDraw>]) -> usize {
        2
    }
}

fn steps() -> Steps {
    let spec = GroupSpec { group: GroupId(0), kind: GroupKind::Full, block_bytes: Bytes(64) };
    let carving =
        Carving { super_bytes: Bytes(64), supers: 64, per_super: vec![1], host_blocks: 0 };
    let carver = Carver::new(&carving, &[spec], (64 * 64, 0), 64, 4).expect("a carving");
    let slots = Slots::new(carver, 4, Tokens(256), VOCAB);
    Steps::new(LIFE, slots, (256, 4), VOCAB as usize, Standing::ALONE)
}

/// What the scheduler would say, one plan after another.
struct Hand {
    steps: Steps,
    seq: StepSeq,
    lives: u32,
    ops: Vec<SlotOp>,
}

impl Hand {
    fn admit(&mut self, slot: u32, tokens: &[u32], sampling: Sampling) {
        self.lives += 1;
        let request = RequestId(u64::from(self.lives));
        let tokens: Vec<TokenId> = tokens.iter().copied().map(TokenId).collect();
        let known = Tokens(tokens.len() as u32);
        let upload =
            Upload { incarnation: LIFE, request, offset: Tokens(0), tokens: tokens.into() };
        self.steps.slots.upload(&upload).expect("tokens");
        // A slot's blocks are its own, whoever lives there.
        let blocks = (0..4).map(|block| BlockId(slot * 4 + block)).collect();
        self.ops.push(SlotOp::Admit(Box::new(Admit {
            slot: SlotRef { slot: SlotId(slot), generation: SlotGeneration(self.lives) },
            request,
            known,
            prompt: known,
            cached: Tokens(0),
            tables: vec![GroupTable { group: GroupId(0), skipped: 0, blocks }],
            sampling: Arc::new(sampling),
            prompt_logprobs: None,
        })));
    }

    fn plan(&mut self, chunks: &[(u32, u32)]) -> StepPlan {
        self.seq = self.seq.next();
        let run = |&(slot, tokens): &(u32, u32)| PrefillRun {
            slot: SlotId(slot),
            tokens: Tokens(tokens),
            sample: true,
        };
        StepPlan {
            seq: self.seq,
            incarnation: LIFE,
            bucket: Tokens(64),
            shard_tokens: vec![Tokens(1)],
            sections: vec![Section {
                ops: core::mem::take(&mut self.ops),
                prefill: chunks.iter().map(run).collect(),
                decode: DecodeDelta {
                    join: chunks.iter().map(|(slot, _)| SlotId(*slot)).collect(),
                    leave: vec![],
                },
            }],
        }
    }
}

fn hand() -> Hand {
    Hand { steps: steps(), seq: StepSeq::ZERO, lives: 0, ops: Vec::new() }
}

/// Outcomes with at most `depth` steps in flight before another, and how many went ahead.
fn run(depth: usize) -> (Vec<Outcome>, usize) {
    let mut hand = hand();
    let mut device = Memory::default();
    hand.admit(0, &[1, 2, 3], Sampling::default());
    hand.admit(1, &[4, 5], Sampling::default());
    let mut plans = vec![hand.plan(&[(0, 3), (1, 2)])];
    plans.extend((0..5).map(|_| hand.plan(&[])));
    // The slot is another's while steps of its last life are in flight.
    hand.ops.push(SlotOp::Retire { slot: SlotId(1) });
    hand.admit(1, &[9], Sampling::default());
    plans.push(hand.plan(&[(1, 1)]));
    plans.extend((0..5).map(|_| hand.plan(&[])));
    // One that the host draws for, which all wait for.
    hand.admit(2, &[8, 8], Sampling { logprobs: Some(1), ..Sampling::default() });
    plans.push(hand.plan(&[(2, 2)]));
    plans.extend((0..3).map(|_| hand.plan(&[])));
    hand.ops.push(SlotOp::Retire { slot: SlotId(2) });
    plans.extend((0..5).map(|_| hand.plan(&[])));
    let (mut outcomes, mut ahead) = (Vec::new(), 0);
    for plan in &plans {
        while hand.steps.in_flight() > depth || !hand.steps.accepts() {
            outcomes.extend(hand.steps.collect(&mut device).expect("a step"));
        }
        ahead += usize::from(hand.steps.in_flight() > 0);
        hand.steps.enqueue(&mut device, plan).expect("a plan that fits");
    }
    while let Some(outcome) = hand.steps.collect(&mut device).expect("a step") {
        outcomes.push(outcome);
    }
    assert_eq!(outcomes.len(), plans.len());
    (outcomes, ahead)
}

#[test]
fn running_ahead_changes_no_token() {
    let (alone, ahead) = run(0);
    assert_eq!(ahead, 0);
    let host = |outcomes: &[Outcome]| {
        outcomes.iter().map(|outcome| outcome.timing.host_draws).collect::<Vec<_>>()
    };
    assert_eq!(host(&alone).iter().filter(|host| **host).count(), 4);
    for depth in [1, 2] {
        let (outcomes, ahead) = run(depth);
        // All but the first and the four behind steps that the host drew for.
        assert_eq!(ahead, alone.len() - 5, "at {depth}");
        assert_eq!(host(&outcomes), host(&alone));
        for (one, other) in alone.iter().zip(&outcomes) {
            assert_eq!((one.seq, &one.sampled), (other.seq, &other.sampled), "at {depth}");
            assert_eq!(one.digest, other.digest, "at {depth}");
        }
    }
}

#[test]
fn a_plan_too_far_ahead_is_refused() {
    let mut hand = hand();
    let mut device = Memory::default();
    hand.admit(0, &[1], Sampling::default());
    for plan in [hand.plan(&[(0, 1)]), hand.plan(&[])] {
        hand.steps.enqueue(&mut device, &plan).expect("a plan that fits");
    }
    let plan = hand.plan(&[]);
    let error = hand.steps.enqueue(&mut device, &plan).expect_err("three in flight");
    let last = StepSeq::ZERO.next().next();
    assert_eq!(error, PlanError::TooFarAhead { got: last.next(), last }.into());
}

#[test]
fn a_fault_is_that_of_the_step_that_met_it() {
    let mut hand = hand();
    let mut device = Memory { fails: Some(1), ..Memory::default() };
    hand.admit(0, &[1], Sampling::default());
    for plan in [hand.plan(&[(0, 1)]), hand.plan(&[])] {
        hand.steps.enqueue(&mut device, &plan).expect("a plan that fits");
    }
    hand.steps.collect(&mut device).expect("the first is fine");
    let StepError::Device { during, step, rows, requests, source } =
        hand.steps.collect(&mut device).expect_err("the second is not")
    else {
        panic!("a failure of the device")
    };
    assert_eq!((during, step), (PROGRAM, StepSeq::ZERO.next().next()));
    assert_eq!((rows, requests, source), (1, 1, BROKEN));
}
