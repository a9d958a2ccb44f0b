//! The run as one number: every plan and every output, in order, so that two runs can be compared.
//!
//! It checks nothing. Invariant: equal digests mean equal plans and outputs, up to collisions.

use super::World;
use crate::rng::chain;
use scheduler::Output;
use step::{SlotOp, StepPlan, WriteSlot};

impl World {
    fn note(&mut self, word: u64) {
        self.figures.digest = chain(self.figures.digest, word);
    }

    pub(super) fn note_plan(&mut self, plan: &StepPlan) {
        self.note(plan.seq.0);
        for section in &plan.sections {
            for op in &section.ops {
                match op {
                    SlotOp::Admit(admit) => {
                        self.note(admit.request.0);
                        self.note(u64::from(admit.slot.slot.0) << 32 | u64::from(admit.cached.0));
                    }
                    SlotOp::Extend { slot, blocks } => {
                        for grant in blocks {
                            let block = u64::from(grant.block.0);
                            self.note(
                                u64::from(slot.0) << 40 | u64::from(grant.group.0) << 32 | block,
                            );
                        }
                    }
                    SlotOp::Trim { slot, first_live, .. } => {
                        self.note(u64::from(slot.0) << 32 | u64::from(*first_live));
                    }
                    SlotOp::Retire { slot } => self.note(u64::from(slot.0)),
                    SlotOp::Store { group, block, at }
                    | SlotOp::Load { at, block: WriteSlot { group, block } } => {
                        self.note(u64::from(block.0) << 32 | u64::from(at.0));
                        let load = u64::from(matches!(op, SlotOp::Load { .. }));
                        self.note(load << 8 | u64::from(group.0));
                    }
                }
            }
            for run in &section.prefill {
                self.note(u64::from(run.slot.0) << 32 | u64::from(run.tokens.0));
            }
            for slot in section.decode.join.iter().chain(&section.decode.leave) {
                self.note(u64::from(slot.0));
            }
        }
    }

    pub(super) fn note_output(&mut self, output: &Output) {
        match output {
            Output::Upload(upload) => {
                self.note(upload.request.0 << 32 | upload.tokens.len() as u64)
            }
            Output::Token { request, token, .. } => self.note(request.0 << 32 | u64::from(token.0)),
            Output::Finished { request, usage, .. } => {
                self.note(request.0 << 32 | u64::from(usage.output.0));
            }
            Output::Forget(_, request)
            | Output::Started { request, .. }
            | Output::Refused { request, .. } => self.note(request.0),
            Output::PromptLogprobs(part) => self.note(u64::from(part.first.0)),
            Output::RestartWorker { incarnation, .. } => self.note(incarnation.0),
        }
    }
}
