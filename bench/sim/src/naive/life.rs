//! What belongs to one life of the worker: its cache, its slots, the steps under way.
//!
//! Who holds a seat is in the list of requests, not here. Invariant: a slot is free, in limbo, or
//! named by a request.

use super::cache::{Cache, Table};
use ids::{Incarnation, RequestId, Timestamp};
use scheduler::{Load, WorkerReady};
use std::collections::VecDeque;
use step::{SlotOp, SlotRef};

/// A step under way.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) seq: u64,
    /// Who runs in it, in which slot, and up to which token of a prompt.
    pub(super) chunks: Vec<(RequestId, SlotRef, u32)>,
    pub(super) samplers: Vec<(RequestId, SlotRef)>,
    pub(super) load: Load,
}

#[derive(Debug)]
pub(super) struct Life {
    pub(super) incarnation: Incarnation,
    pub(super) cache: Cache,
    pub(super) generations: Vec<u32>,
    /// Free slots; the last is taken first.
    pub(super) free: Vec<u32>,
    /// Slots that come free when a step is over.
    pub(super) slot_limbo: Vec<(u64, u32)>,
    pub(super) flights: VecDeque<Flight>,
    pub(super) head_since: Timestamp,
    pub(super) ops: Vec<SlotOp>,
    /// Blocks of requests that gave up their seats.
    pub(super) draining: Vec<Vec<Table>>,
    /// Blocks that may still be given back before the next step.
    pub(super) slice: u32,
    /// Requests that ended, in that order, whose slots are still named.
    pub(super) closing: Vec<RequestId>,
    pub(super) isolated: bool,
    pub(super) frugal: bool,
    pub(super) condemned: bool,
}

impl Life {
    pub(super) fn new(ready: &WorkerReady, slots: u32, now: Timestamp) -> Self {
        Self {
            incarnation: ready.incarnation,
            cache: Cache::new(ready),
            generations: vec![0; slots as usize],
            free: (0..slots).rev().collect(),
            slot_limbo: Vec::new(),
            flights: VecDeque::new(),
            head_since: now,
            ops: Vec::new(),
            draining: Vec::new(),
            slice: 0,
            closing: Vec::new(),
            isolated: false,
            frugal: false,
            condemned: false,
        }
    }

    /// Gives blocks of the unseated back, up to what is left of the slice: last groups first,
    /// last blocks first.
    pub(super) fn drain(&mut self) {
        while self.slice > 0 && !self.draining.is_empty() {
            let tables = &mut self.draining[0];
            let last = tables.iter().rposition(|table| !table.blocks.is_empty());
            match last.and_then(|group| Some((group, tables[group].blocks.pop()?))) {
                Some((group, (block, _))) => {
                    self.cache.give_back(group, block);
                    self.slice -= 1;
                }
                None => drop(self.draining.remove(0)),
            }
        }
    }

    /// Blocks of a group that come back without anybody giving up a seat.
    pub(super) fn arriving(&self, group: usize) -> u32 {
        let draining: usize = self.draining.iter().map(|tables| tables[group].blocks.len()).sum();
        self.cache.arriving(group) + draining as u32
    }
}
