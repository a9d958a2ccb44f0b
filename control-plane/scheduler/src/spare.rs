//! Vectors that are used again, so that a step in which nobody comes or goes takes no memory.
//!
//! It holds no content. Invariant: what is handed out is empty, and no more is kept than steps can
//! be in flight.

use crate::config::MAX_DEPTH;
use crate::job::Rank;
use crate::slab::Key;
use ids::Tokens;
use step::{Section, SlotOp, StepPlan, WriteSlot};

/// Plans kept: those in flight and one that is made.
const PLANS: usize = MAX_DEPTH as usize + 2;
/// Lists of blocks kept: one for each request that may extend in the plans kept.
const BLOCKS: usize = 4096;

/// The two lists of a plan, whose sections are in use elsewhere.
#[derive(Debug, Default)]
pub(crate) struct Shells(Vec<(Vec<Tokens>, Vec<Section>)>);

impl Shells {
    pub(crate) fn take(&mut self) -> (Vec<Tokens>, Vec<Section>) {
        self.0.pop().unwrap_or_default()
    }

    /// Takes the lists of a plan back; a section that is left in it is lost.
    pub(crate) fn take_back(&mut self, mut plan: StepPlan) {
        if self.0.len() < PLANS {
            plan.shard_tokens.clear();
            plan.sections.clear();
            self.0.push((plan.shard_tokens, plan.sections));
        }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Spare {
    pub(crate) shells: Shells,
    sections: Vec<Section>,
    blocks: Vec<Vec<WriteSlot>>,
    /// Scratch: decoding requests at the end of their blocks.
    pub(crate) short: Vec<(Rank, Key)>,
}

impl Spare {
    /// A section that holds nothing.
    pub(crate) fn section(&mut self) -> Section {
        self.sections.pop().unwrap_or_default()
    }

    /// Takes a section back.
    pub(crate) fn take_back(&mut self, mut section: Section) {
        if self.sections.len() >= PLANS {
            return;
        }
        for op in section.ops.drain(..) {
            if let SlotOp::Extend { blocks, .. } = op {
                self.give_back(blocks);
            }
        }
        section.prefill.clear();
        section.decode.join.clear();
        section.decode.leave.clear();
        self.sections.push(section);
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
