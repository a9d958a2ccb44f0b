//! The cache of one incarnation: every move a block can make, each in constant time.
//!
//! ```text
//!  free ──mint──> owned ──seal──> shared <──hit── cached
//!   ^               │               │ last release  │ ^
//!   │            discard            ├── indexed ────┘ │ (waits for its epoch, then evictable)
//!   └── Retired ── limbo <──────────┴── private       │
//!   └──────────────── evict ──────────────────────────┘
//! ```
//! An evicted block's content goes to the memory behind the cache where there is some; it comes back in
//! a block that is minted for it and sealed at once, since its hash names what it will hold.
//! It decides nothing about requests: who mints and who is preempted is the scheduler's business.
//! Invariant: see the crate; and a block reaches `free` only past a [`Retired`] that covers its
//! last release.

use crate::block::{Buried, SharedBlock, WritableBlock};
use crate::epoch::{EpochError, Epochs, Retired};
use crate::index::Index;
use crate::list::{Link, List, links};
use crate::supers::Supers;
use crate::tier::Tier;
use ids::{BlockHash, BlockId, Blocks, GroupId, StepSeq};
use step::{Carving, GroupKind, GroupSpec, SlotOp};

/// What a block is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// In its super-block's free list, or its super-block is unbound.
    Free,
    /// One [`WritableBlock`] exists.
    Owned,
    /// As many [`SharedBlock`]s as `refs` exist.
    Shared,
    /// Indexed and unreferenced, last released under an epoch that is still in flight.
    Waiting,
    /// Indexed, unreferenced, evictable.
    Evictable,
    /// Not indexed; its epoch is still in flight.
    Limbo,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Meta {
    pub(crate) state: State,
    pub(crate) indexed: bool,
    pub(crate) refs: u32,
    /// The newest launched step when the block was last released.
    pub(crate) stamp: StepSeq,
}

/// Blocks of one group by what they are doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// In super-blocks bound to the group, ready to be minted.
    pub free: Blocks,
    /// Writable.
    pub owned: Blocks,
    /// Sealed and referenced.
    pub shared: Blocks,
    /// Sealed, in the prefix index, unreferenced.
    pub cached: Blocks,
    /// Released and not in the index, waiting for their epoch.
    pub limbo: Blocks,
}

impl Counts {
    /// All blocks of the super-blocks bound to the group.
    #[must_use]
    pub fn total(&self) -> Blocks {
        self.free + self.owned + self.shared + self.cached + self.limbo
    }
}

/// No block can be minted now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no block of group {group} can be minted now")]
pub struct Shortage {
    /// The group asked for.
    pub group: GroupId,
}

#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) kind: GroupKind,
    pub(crate) metas: Vec<Meta>,
    pub(crate) links: Vec<Link>,
    pub(crate) index: Index,
    pub(crate) owned: u32,
    pub(crate) shared: u32,
    /// The three lists are ordered by release, so stamps never decrease along them.
    pub(crate) waiting: List,
    pub(crate) evictable: List,
    pub(crate) limbo: List,
    /// The memory behind the cache, if there is any.
    pub(crate) tier: Option<Tier>,
}

/// All KV blocks of one shard in one incarnation.
#[derive(Debug)]
pub struct KvCache {
    pub(crate) groups: Vec<Group>,
    pub(crate) supers: Supers,
    epochs: Epochs,
    /// Copies decided and not taken yet, in that order.
    pub(crate) copies: Vec<SlotOp>,
}

impl KvCache {
    /// A cache with everything free. Groups and carving must agree, as [`crate::carve`] makes them.
    #[must_use]
    pub fn new(specs: &[GroupSpec], carving: &Carving) -> Self {
        let group = |(spec, per): (&GroupSpec, &u32)| {
            let blocks = carving.supers as usize * *per as usize;
            let free = Meta { state: State::Free, indexed: false, refs: 0, stamp: StepSeq::ZERO };
            Group {
                kind: spec.kind,
                metas: vec![free; blocks],
                links: links(blocks),
                index: Index::new(blocks),
                owned: 0,
                shared: 0,
                waiting: List::default(),
                evictable: List::default(),
                limbo: List::default(),
                tier: (carving.host_blocks > 0).then(|| Tier::new(carving.host_blocks)),
            }
        };
        Self {
            groups: specs.iter().zip(&carving.per_super).map(group).collect(),
            supers: Supers::new(carving.supers, &carving.per_super),
            epochs: Epochs::default(),
            copies: Vec::new(),
        }
    }

    /// The cache's memory is gone; its handles may be voided.
    #[must_use]
    pub fn bury(self) -> Buried {
        Buried::new()
    }

    /// Counts a step as launched and numbers it. Releases from now on wait for it.
    pub fn launch(&mut self) -> StepSeq {
        self.epochs.launch()
    }

    /// The newest launched step.
    #[must_use]
    pub fn launched(&self) -> StepSeq {
        self.epochs.launched()
    }

    /// Whether `seq` is the step that retires next.
    ///
    /// # Errors
    /// When it is repeated, early or was never launched.
    pub fn may_retire(&self, seq: StepSeq) -> Result<(), EpochError> {
        self.epochs.may_retire(seq)
    }

    /// Takes note that a step is over.
    ///
    /// # Errors
    /// When it is not the one due.
    pub fn retire(&mut self, seq: StepSeq) -> Result<Retired, EpochError> {
        self.epochs.retire(seq)
    }

    /// Proof of what has retired so far.
    pub fn proof(&self) -> Retired {
        self.epochs.proof()
    }

    /// Makes what waited for the epoch available again.
    pub fn reclaim(&mut self, retired: Retired) {
        for (i, group) in self.groups.iter_mut().enumerate() {
            let id = GroupId(u8::try_from(i).unwrap_or(u8::MAX));
            while let Some(i) = group.limbo.front() {
                if !retired.covers(group.metas[i as usize].stamp) {
                    break;
                }
                group.limbo.remove(&mut group.links, i);
                group.metas[i as usize].state = State::Free;
                self.supers.unhold(id, BlockId(i));
                self.supers.put(id, BlockId(i));
            }
            while let Some(i) = group.waiting.front() {
                if !retired.covers(group.metas[i as usize].stamp) {
                    break;
                }
                group.waiting.remove(&mut group.links, i);
                group.evictable.push_back(&mut group.links, i);
                group.metas[i as usize].state = State::Evictable;
                self.supers.unhold(id, BlockId(i));
            }
        }
    }

    /// A block to write. Takes a free one, else evicts the group's longest unused block, else
    /// empties an idle super-block of another group.
    ///
    /// # Errors
    /// When every block is in use or waits for an epoch.
    pub fn mint(&mut self, group: GroupId) -> Result<WritableBlock, Shortage> {
        loop {
            if let Some(block) = self.supers.take(group) {
                let g = &mut self.groups[group.index()];
                let meta = &mut g.metas[block.index()];
                debug_assert_eq!(meta.state, State::Free);
                meta.state = State::Owned;
                g.owned += 1;
                return Ok(WritableBlock::new(group, block));
            }
            if !self.evict_oldest(group) && !self.empty_idle(group) {
                return Err(Shortage { group });
            }
        }
    }

    /// As [`KvCache::mint`], but keeps nothing cached that stands in the way of a new block, so
    /// that a group binds no more super-blocks than what it holds needs.
    ///
    /// # Errors
    /// When every block is in use or waits for an epoch.
    pub fn mint_frugally(&mut self, group: GroupId) -> Result<WritableBlock, Shortage> {
        if self.supers.free(group) == 0 {
            self.evict_oldest(group);
        }
        self.mint(group)
    }

    fn evict_oldest(&mut self, group: GroupId) -> bool {
        let oldest = self.groups[group.index()].evictable.front();
        oldest.inspect(|block| self.evict(group, BlockId(*block))).is_some()
    }

    /// Empties a super-block of another group in which nothing is held.
    fn empty_idle(&mut self, group: GroupId) -> bool {
        let Some((other, blocks)) = self.supers.idle_elsewhere(group) else { return false };
        for block in blocks {
            if self.groups[other.index()].metas[block as usize].state == State::Evictable {
                self.evict(other, BlockId(block));
            }
        }
        true
    }

    /// Moves the copies that were decided since the last call behind `ops`. Whatever a plan says of a
    /// block that was minted meanwhile must stand behind them; among themselves they keep their order, in
    /// which a place is read before it is overwritten.
    pub fn take_copies(&mut self, ops: &mut Vec<SlotOp>) {
        ops.append(&mut self.copies);
    }

    /// Ends writing: the block's content is complete, confirmed, and named by `hash`.
    ///
    /// Where another block has the name already, that one stays the canonical entry and this one
    /// is shared by its present holder alone.
    pub fn seal(&mut self, block: WritableBlock, hash: BlockHash) -> SharedBlock {
        let (group, block) = block.into_id();
        let g = &mut self.groups[group.index()];
        let indexed = g.index.get(hash).is_none();
        if indexed {
            g.index.insert(hash, block);
        }
        g.owned -= 1;
        g.shared += 1;
        let meta = &mut g.metas[block.index()];
        meta.state = State::Shared;
        meta.indexed = indexed;
        meta.refs = 1;
        SharedBlock::new(group, block)
    }

    /// One more count of the same block.
    pub fn share(&mut self, block: &SharedBlock) -> SharedBlock {
        self.groups[block.group().index()].metas[block.id().index()].refs += 1;
        SharedBlock::new(block.group(), block.id())
    }

    /// Gives back one count. The last one leaves the block to the prefix index, or to limbo when
    /// it is not indexed. Release a sequence from its tail, so that children are evicted before
    /// their parents.
    pub fn release(&mut self, block: SharedBlock) {
        let (group, block) = block.into_id();
        let g = &mut self.groups[group.index()];
        let meta = &mut g.metas[block.index()];
        meta.refs -= 1;
        if meta.refs > 0 {
            return;
        }
        g.shared -= 1;
        if meta.indexed {
            let proof = self.epochs.proof();
            meta.stamp = self.epochs.launched();
            if proof.covers(meta.stamp) {
                meta.state = State::Evictable;
                g.evictable.push_back(&mut g.links, block.0);
                self.supers.unhold(group, block);
            } else {
                meta.state = State::Waiting;
                g.waiting.push_back(&mut g.links, block.0);
            }
        } else {
            self.part(group, block);
        }
    }

    /// Gives back a block whose content nobody will want.
    pub fn discard(&mut self, block: WritableBlock) {
        let (group, block) = block.into_id();
        self.groups[group.index()].owned -= 1;
        self.part(group, block);
    }

    /// Evicts everything that nobody references, so that super-blocks can change groups.
    pub fn purge(&mut self) {
        for i in 0..self.groups.len() {
            let id = GroupId(u8::try_from(i).unwrap_or(u8::MAX));
            while let Some(block) = self.groups[i].evictable.front() {
                self.evict(id, BlockId(block));
            }
            while let Some(block) = self.groups[i].waiting.front() {
                self.evict(id, BlockId(block));
            }
        }
    }

    /// What the group's blocks are doing.
    #[must_use]
    pub fn counts(&self, group: GroupId) -> Counts {
        let g = &self.groups[group.index()];
        Counts {
            free: Blocks(self.supers.free(group)),
            owned: Blocks(g.owned),
            shared: Blocks(g.shared),
            cached: Blocks(g.waiting.len() + g.evictable.len()),
            limbo: Blocks(g.limbo.len()),
        }
    }

    /// At most this many blocks of the group can be minted now. Exact with one group; with
    /// several, an unbound super-block is counted for each of them.
    #[must_use]
    pub fn mintable(&self, group: GroupId) -> Blocks {
        let own = self.supers.free(group) + self.groups[group.index()].evictable.len();
        let obtainable = self.supers.obtainable(group).saturating_mul(self.supers.per_super(group));
        Blocks(own.saturating_add(obtainable))
    }

    /// Blocks of the group that become mintable when the steps in flight retire.
    #[must_use]
    pub fn arriving(&self, group: GroupId) -> Blocks {
        let g = &self.groups[group.index()];
        Blocks(g.limbo.len() + g.waiting.len())
    }

    /// Blocks in the memory behind the cache, of all groups, and how many there is room for.
    #[must_use]
    pub fn behind(&self) -> (Blocks, Blocks) {
        let tiers = || self.groups.iter().filter_map(|g| g.tier.as_ref());
        (tiers().map(|t| Blocks(t.len())).sum(), tiers().map(|t| Blocks(t.slots())).sum())
    }

    /// Number of groups.
    #[must_use]
    pub fn groups(&self) -> usize {
        self.groups.len()
    }

    /// What the layers of a group read.
    #[must_use]
    pub fn kind(&self, group: GroupId) -> GroupKind {
        self.groups[group.index()].kind
    }

    /// Whether any group reads only a window of the past.
    #[must_use]
    pub fn slides(&self) -> bool {
        self.groups.iter().any(|g| g.kind != GroupKind::Full)
    }

    /// Super-blocks needed to hold this many blocks of each group at once.
    #[must_use]
    pub fn supers_for(&self, blocks: &[Blocks]) -> u64 {
        let supers = |(i, b): (usize, &Blocks)| {
            let per = self.supers.per_super(GroupId(u8::try_from(i).unwrap_or(u8::MAX)));
            u64::from(b.0.div_ceil(per.max(1)))
        };
        blocks.iter().enumerate().map(supers).sum()
    }

    /// All super-blocks.
    #[must_use]
    pub fn supers(&self) -> u32 {
        self.supers.count()
    }

    /// Super-blocks in which nothing is held or cached.
    #[must_use]
    pub fn unbound(&self) -> u32 {
        self.supers.unbound()
    }

    /// Share of the cache's memory that live requests or limbo hold, between 0 and 1.
    #[must_use]
    pub fn usage(&self) -> f64 {
        let held = |(i, g): (usize, &Group)| {
            let per = self.supers.per_super(GroupId(u8::try_from(i).unwrap_or(u8::MAX)));
            f64::from(g.owned + g.shared + g.limbo.len()) / f64::from(per.max(1))
        };
        let held: f64 = self.groups.iter().enumerate().map(held).sum();
        held / f64::from(self.supers.count().max(1))
    }

    /// A held, unindexed block that is given up: free at once when nothing is in flight.
    fn part(&mut self, group: GroupId, block: BlockId) {
        let g = &mut self.groups[group.index()];
        let meta = &mut g.metas[block.index()];
        meta.refs = 0;
        meta.stamp = self.epochs.launched();
        if self.epochs.proof().covers(meta.stamp) {
            meta.state = State::Free;
            self.supers.unhold(group, block);
            self.supers.put(group, block);
        } else {
            meta.state = State::Limbo;
            g.limbo.push_back(&mut g.links, block.0);
        }
    }

    /// Takes an unreferenced block out of the index; through limbo where its epoch is in flight.
    fn evict(&mut self, group: GroupId, block: BlockId) {
        let g = &mut self.groups[group.index()];
        if let Some(tier) = &mut g.tier
            && let Some(at) = tier.keep(g.index.name(block))
        {
            self.copies.push(SlotOp::Store { group, block, at });
        }
        g.index.remove(block);
        let meta = &mut g.metas[block.index()];
        meta.indexed = false;
        if meta.state == State::Waiting {
            g.waiting.remove(&mut g.links, block.0);
            // Its own, older stamp could stand behind newer ones; the newest keeps the order.
            meta.stamp = self.epochs.launched();
            meta.state = State::Limbo;
            g.limbo.push_back(&mut g.links, block.0);
        } else {
            debug_assert_eq!(meta.state, State::Evictable);
            g.evictable.remove(&mut g.links, block.0);
            meta.state = State::Free;
            self.supers.put(group, block);
        }
    }
}

#[cfg(test)]
mod tests;
