//! Vectors that are used again, so that a step in which nobody comes or goes takes no memory.
//!
//! It holds no content. Invariant: what is handed out is empty, and no more is kept than steps can
//! be in flight.

use crate::config::MAX_DEPTH;
use crate::job::Rank;
use crate::slab::Key;
use step::{Section, SlotOp, WriteSlot};

/// Plans kept: those in flight and one that is made.
const PLANS: usize = MAX_DEPTH as usize + 2;
/// Lists of blocks kept: one for each request that may extend in the plans kept.
const BLOCKS: usize = 4096;

#[derive(Debug, Default)]
pub(crate) struct Spare {
    tokens: Vec<Vec<ids::Tokens>>,
    sections: Vec<Vec<Section>>,
    blocks: Vec<Vec<WriteSlot>>,
    /// Scratch: decoding requests at the end of their blocks.
    pub(crate) short: Vec<(Rank, Key)>,
}

impl Spare {
    /// The two lists of a plan, with one section that holds nothing.
    pub(crate) fn plan(&mut self) -> (Vec<ids::Tokens>, Vec<Section>) {
        let mut sections = self.sections.pop().unwrap_or_default();
        sections.resize_with(1, Section::default);
        (self.tokens.pop().unwrap_or_default(), sections)
    }

    /// Takes back what a plan was made of.
    pub(crate) fn take_back(&mut self, mut plan: step::StepPlan) {
        if self.sections.len() >= PLANS {
            return;
        }
        for section in &mut plan.sections {
            for op in section.ops.drain(..) {
                if let SlotOp::Extend { blocks, .. } = op {
                    self.give_back(blocks);
                }
            }
            section.prefill.clear();
            section.decode.join.clear();
            section.decode.leave.clear();
        }
        plan.shard_tokens.clear();
        self.tokens.push(plan.shard_tokens);
        self.sections.push(plan.sections);
    }

    /// A list for blocks.
    pub(crate) fn blocks(&mut self) -> Vec<WriteSlot> {
        self.blocks.pop().unwrap_or_default()
    }

    /// Takes a list back.
    pub(crate) fn give_back(&mut self, mut blocks: Vec<WriteSlot>) {
        if self.blocks.len() < BLOCKS && blocks.capacity() > 0 {
            blocks.clear();
            self.blocks.push(blocks);
        }
    }
}
