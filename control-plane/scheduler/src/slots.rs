//! The rows of the worker's slot table: who sits where, in which life of the row.
//!
//! A row is held through a [`SlotLease`]; like a block, it is given again only after the steps
//! that may refer to it have retired. It does not know request states. Invariant: a row's current
//! generation belongs to at most one lease.

use crate::slab::Key;
use ids::{SlotGeneration, SlotId, StepSeq};
use kv_cache::{Buried, Retired};
use std::collections::VecDeque;
use step::SlotRef;

/// The right to one row of the slot table, for one life of it.
#[must_use = "a slot is given back to the table"]
#[derive(Debug)]
pub struct SlotLease {
    at: SlotRef,
}

impl SlotLease {
    /// The row and its life, as plans and outcomes name it.
    #[must_use]
    pub fn at(&self) -> SlotRef {
        self.at
    }

    /// Drops a lease on a worker that is gone.
    pub(crate) fn void(self, _: &Buried) {
        core::mem::forget(self);
    }
}

impl Drop for SlotLease {
    fn drop(&mut self) {
        let slot = self.at.slot;
        debug_assert!(std::thread::panicking(), "slot {slot} was dropped, not given back");
    }
}

#[derive(Clone, Debug)]
struct Row {
    generation: SlotGeneration,
    occupant: Option<Key>,
    /// Scratch of outcome checking: the step that a sample is expected from, and whether it came.
    expects: StepSeq,
    sampled: bool,
}

#[derive(Debug)]
pub(crate) struct Slots {
    rows: Vec<Row>,
    free: Vec<SlotId>,
    limbo: VecDeque<(StepSeq, SlotId)>,
}

impl Slots {
    pub(crate) fn new(rows: u32) -> Self {
        let row = Row {
            generation: SlotGeneration(0),
            occupant: None,
            expects: StepSeq::ZERO,
            sampled: false,
        };
        Self {
            rows: vec![row; rows as usize],
            free: (0..rows).rev().map(SlotId).collect(),
            limbo: VecDeque::new(),
        }
    }

    /// A free row for a new life.
    pub(crate) fn take(&mut self, occupant: Key) -> Option<SlotLease> {
        let slot = self.free.pop()?;
        let row = &mut self.rows[slot.index()];
        row.generation = row.generation.next();
        row.occupant = Some(occupant);
        Some(SlotLease { at: SlotRef { slot, generation: row.generation } })
    }

    /// Takes back a row that steps up to `launched` may refer to.
    pub(crate) fn give_back(&mut self, lease: SlotLease, launched: StepSeq, retired: &Retired) {
        let slot = lease.at.slot;
        core::mem::forget(lease);
        self.rows[slot.index()].occupant = None;
        if retired.covers(launched) {
            self.free.push(slot);
        } else {
            self.limbo.push_back((launched, slot));
        }
    }

    /// Makes rows free whose last step has retired.
    pub(crate) fn reclaim(&mut self, retired: &Retired) {
        while let Some((stamp, slot)) = self.limbo.front().copied()
            && retired.covers(stamp)
        {
            self.limbo.pop_front();
            self.free.push(slot);
        }
    }

    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    pub(crate) fn arriving(&self) -> usize {
        self.limbo.len()
    }

    /// Who sits in the row, if it is still in the life named.
    pub(crate) fn occupant(&self, at: SlotRef) -> Option<Key> {
        let row = self.rows.get(at.slot.index())?;
        row.occupant.filter(|_| row.generation == at.generation)
    }

    /// Whether `sampled` names each of `expected` exactly once and nothing else.
    pub(crate) fn matches(
        &mut self,
        seq: StepSeq,
        expected: &[SlotRef],
        sampled: &[step::Sampled],
    ) -> bool {
        for at in expected {
            let row = &mut self.rows[at.slot.index()];
            row.expects = seq;
            row.sampled = false;
        }
        let mut missing = expected.len();
        // A row's life cannot end while a step that names it is in flight, so its present
        // generation is the expected one.
        for s in sampled {
            match self.rows.get_mut(s.slot.index()) {
                Some(row)
                    if row.expects == seq && row.generation == s.generation && !row.sampled =>
                {
                    row.sampled = true;
                    missing -= 1;
                }
                Some(_) | None => return false,
            }
        }
        missing == 0
    }
}
