//! The smallest worker: it answers each plan with the right slots and checks nothing.
//!
//! What it draws is its caller's, and how long a step takes. Invariant: an outcome samples exactly
//! the slots that its plan asks for.

use ids::{RequestId, TokenId, Tokens};
use scheduler::Planned;
use std::collections::{BTreeMap, VecDeque};
use step::{Outcome, Sampled, SlotOp, SlotRef, StepTiming};

/// A worker's slots and the outcomes it has not handed over.
#[derive(Debug, Default)]
pub struct Echo {
    decoding: BTreeMap<u32, SlotRef>,
    seats: BTreeMap<u32, (SlotRef, RequestId)>,
    /// Oldest first.
    pub outcomes: VecDeque<Outcome>,
}

impl Echo {
    /// Carries a plan out; `draw` gives the next token of a request.
    pub fn step(
        &mut self,
        planned: &Planned,
        total_ns: u64,
        mut draw: impl FnMut(RequestId) -> TokenId,
    ) {
        let mut sampled = Vec::new();
        for section in &planned.plan.sections {
            for op in &section.ops {
                match op {
                    SlotOp::Admit(admit) => {
                        self.seats.insert(admit.slot.slot.0, (admit.slot, admit.request));
                    }
                    SlotOp::Retire { slot } => {
                        self.decoding.remove(&slot.0);
                    }
                    SlotOp::Extend { .. }
                    | SlotOp::Trim { .. }
                    | SlotOp::Store { .. }
                    | SlotOp::Load { .. } => {}
                }
            }
            for slot in &section.decode.leave {
                self.decoding.remove(&slot.0);
            }
            let seats = &self.seats;
            let ran = section.prefill.iter().filter(|run| run.sample).map(|run| run.slot.0);
            for slot in ran.chain(self.decoding.keys().copied()) {
                if let Some((SlotRef { slot, generation }, request)) = seats.get(&slot).copied() {
                    let token = draw(request);
                    sampled.push(Sampled { slot, generation, token, fault: None, logprobs: None });
                }
            }
            for slot in &section.decode.join {
                if let Some((at, _)) = self.seats.get(&slot.0) {
                    self.decoding.insert(slot.0, *at);
                }
            }
        }
        let tokens = planned.plan.shard_tokens.iter().copied().sum::<Tokens>().0;
        let prefill_tokens = planned.report.prefill_tokens.0;
        let timing = StepTiming {
            total_ns,
            model_ns: total_ns / 10 * 9,
            tokens,
            prefill_tokens,
            ..StepTiming::default()
        };
        self.outcomes.push_back(Outcome {
            seq: planned.plan.seq,
            incarnation: planned.plan.incarnation,
            sampled,
            prompt_logprobs: Vec::new(),
            timing,
            digest: 0,
        });
    }
}
