//! Everything that belongs to one life of the worker and dies with it: its cache, its slots, the
//! steps in flight, and what the next plan must tell it.
//!
//! Requests outlive it. Invariant: every handle to a block or slot of this life is in a seat of a
//! running request, in `draining`, or in a closing request.

use crate::event::WorkerReady;
use crate::job::Rank;
use crate::report::Gauges;
use crate::slab::Key;
use crate::slots::Slots;
use crate::tables::Tables;
use ids::{Blocks, GroupId, Incarnation, SlotId, StepSeq, Timestamp, Tokens};
use kv_cache::KvCache;
use std::collections::{BTreeMap, VecDeque};
use step::{SlotOp, SlotRef};

use crate::policy::cost::Load;

#[derive(Debug)]
pub(crate) struct Life {
    pub(crate) incarnation: Incarnation,
    pub(crate) cache: KvCache,
    pub(crate) slots: Slots,
    /// Launched and not retired, oldest first.
    pub(crate) flights: VecDeque<Flight>,
    /// Flights that ended; their vectors are used again.
    pub(crate) spare: Vec<Flight>,
    /// When the oldest step in flight could start.
    pub(crate) head_since: Timestamp,
    /// Operations that the next plan carries first.
    pub(crate) ops: Vec<SlotOp>,
    /// Slots that the next plan takes out of the decode set.
    pub(crate) leaving: Vec<SlotId>,
    pub(crate) draining: VecDeque<Tables>,
    /// Blocks that may still be released this step.
    pub(crate) slice: u32,
    /// Closing requests in order of the step they wait for.
    pub(crate) closing: VecDeque<Key>,
    pub(crate) running: BTreeMap<Rank, Key>,
    pub(crate) prefilling: BTreeMap<Rank, Key>,
    /// Decoding requests in no order; each knows its position.
    pub(crate) decoding: Vec<Key>,
    /// Set while a request that killed workers runs; nothing is admitted beside it.
    pub(crate) isolated: bool,
    /// Set while one request runs alone after the pool was emptied for it.
    pub(crate) frugal: bool,
    /// Said once that the worker must be restarted.
    pub(crate) condemned: bool,
}

/// A launched step, as far as its outcome needs it.
#[derive(Debug, Default)]
pub(crate) struct Flight {
    pub(crate) seq: StepSeq,
    /// Slots that sample.
    pub(crate) samplers: Vec<SlotRef>,
    /// Prompt chunks: the slot and how far its tokens are computed afterwards.
    pub(crate) chunks: Vec<(SlotRef, Tokens)>,
    pub(crate) load: Load,
}

impl Life {
    pub(crate) fn new(ready: &WorkerReady, rows: u32, now: Timestamp) -> Self {
        Self {
            incarnation: ready.incarnation,
            cache: KvCache::new(&ready.groups, &ready.carving),
            slots: Slots::new(rows),
            flights: VecDeque::new(),
            spare: Vec::new(),
            head_since: now,
            ops: Vec::new(),
            leaving: Vec::new(),
            draining: VecDeque::new(),
            slice: 0,
            closing: VecDeque::new(),
            running: BTreeMap::new(),
            prefilling: BTreeMap::new(),
            decoding: Vec::new(),
            isolated: false,
            frugal: false,
            condemned: false,
        }
    }

    /// Releases tables that nobody owns any more, at most what is left of this step's slice.
    pub(crate) fn drain(&mut self) {
        while self.slice > 0
            && let Some(tables) = self.draining.front_mut()
        {
            let released = tables.release_tail(&mut self.cache, self.slice);
            if released < self.slice {
                self.draining.pop_front();
            }
            self.slice -= released;
        }
    }

    /// Puts the copies that minting and purging brought about behind the operations of the next plan, in
    /// front of any that names a block minted since.
    pub(crate) fn copy_first(&mut self, counters: &mut Gauges) {
        let known = self.ops.len();
        self.cache.take_copies(&mut self.ops);
        for copy in &self.ops[known..] {
            counters.host_stores += u64::from(matches!(copy, SlotOp::Store { .. }));
            counters.host_loads += u64::from(matches!(copy, SlotOp::Load { .. }));
        }
    }

    /// Takes back the admissions that no plan will carry: whoever was let in gave way to one for whom there
    /// was no room in the end. Their tokens are sent anew, before the next plan, in which an admission of
    /// before would use them up.
    pub(crate) fn withdraw_admissions(&mut self) {
        let mut unsent = Vec::new();
        self.ops.retain(|op| match op {
            SlotOp::Admit(admit) => {
                unsent.push(admit.slot.slot);
                false
            }
            SlotOp::Extend { slot, .. } | SlotOp::Trim { slot, .. } => !unsent.contains(slot),
            SlotOp::Retire { slot } => match unsent.iter().position(|admitted| admitted == slot) {
                Some(at) => {
                    unsent.swap_remove(at);
                    false
                }
                None => true,
            },
            SlotOp::Store { .. } | SlotOp::Load { .. } => true,
        });
        debug_assert!(unsent.is_empty(), "whoever has a seat runs in a step");
    }

    /// Blocks that become mintable without anything being taken from anyone.
    pub(crate) fn arriving(&self, group: GroupId) -> Blocks {
        let draining: Blocks = self.draining.iter().map(|tables| tables.held(group)).sum();
        self.cache.arriving(group) + draining
    }
}
