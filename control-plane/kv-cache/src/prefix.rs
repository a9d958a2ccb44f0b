//! Finding and taking the longest cached prefix that every group supports.
//!
//! A full-attention group supports a boundary when every block before it is present; a sliding
//! group when the blocks holding the last `window - 1` tokens before it are. It does not limit the
//! hit to leave a token to compute: the caller asks for fewer hashes.
//! What lies in the memory behind the cache counts as present and is brought back when it is taken.
//! Invariant: a hit is a whole number of blocks and can be taken until the cache changes.

use crate::block::SharedBlock;
use crate::pool::{Group, KvCache, Shortage, State};
use ids::{BlockHash, Blocks, GroupId, TierSlot, Tokens};
use step::{GroupKind, SlotOp};

/// A boundary that every group supports now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    /// Blocks of the prompt before the boundary.
    pub boundary: Blocks,
    /// The boundary that the cache alone supports; the rest comes from the memory behind it.
    pub resident: Blocks,
}

impl Hit {
    /// Nothing was found.
    pub const NONE: Self = Self { boundary: Blocks::ZERO, resident: Blocks::ZERO };
}

/// A block of a hit that is to be brought back.
#[derive(Clone, Copy, Debug)]
struct Absent {
    group: GroupId,
    /// Its place among the blocks of its group's prefix.
    nth: usize,
    hash: BlockHash,
    at: TierSlot,
}

/// A slot's shared prefix in one group.
#[derive(Debug)]
pub struct Prefix {
    /// The group.
    pub group: GroupId,
    /// Leading logical blocks that are never read again.
    pub skipped: Blocks,
    /// The blocks from there to the boundary.
    pub blocks: Vec<SharedBlock>,
}

/// First logical block that a query at `position` or later may still read.
#[must_use]
pub fn first_live(kind: GroupKind, position: Tokens) -> Blocks {
    match kind {
        GroupKind::Full => Blocks::ZERO,
        // The query at `position` reads itself and the `window - 1` tokens before it.
        GroupKind::Sliding { window } => {
            Tokens((position.0 + 1).saturating_sub(window.0.max(1))).blocks_full()
        }
    }
}

impl KvCache {
    /// The longest boundary within `hashes` (chained, one per full block) that all groups support.
    #[must_use]
    pub fn lookup(&self, hashes: &[BlockHash]) -> Hit {
        let boundary = self.boundary(hashes, |group, hash| {
            group.index.get(hash).is_some()
                || group.tier.as_ref().is_some_and(|tier| tier.find(hash).is_some())
        });
        let tiered = self.groups.iter().any(|g| g.tier.is_some());
        let resident = match tiered {
            true => self.boundary(&hashes[..boundary], |g, hash| g.index.get(hash).is_some()),
            false => boundary,
        };
        let blocks = |n| Blocks(u32::try_from(n).unwrap_or(u32::MAX));
        Hit { boundary: blocks(boundary), resident: blocks(resident) }
    }

    /// The longest boundary that all groups support with the blocks that are `present`.
    fn boundary(&self, hashes: &[BlockHash], present: impl Fn(&Group, BlockHash) -> bool) -> usize {
        let mut most = hashes.len();
        for group in self.groups.iter().filter(|g| g.kind == GroupKind::Full) {
            let found = hashes[..most].iter().take_while(|hash| present(group, **hash));
            most = found.count();
        }
        // A group may push the boundary back below what another supports, so repeat until none
        // does; every round but the last shortens it.
        loop {
            let before = most;
            for group in &self.groups {
                if let GroupKind::Sliding { .. } = group.kind {
                    most = window_boundary(group, &hashes[..most], |hash| present(group, hash));
                }
            }
            if most == before {
                return most;
            }
        }
    }

    /// Blocks that count as mintable in the group until the hit is taken: those of it that nobody
    /// references, and one to be minted for each that is brought back.
    #[must_use]
    pub fn claimed_by(&self, group: GroupId, hashes: &[BlockHash], hit: Hit) -> Blocks {
        let g = &self.groups[group.index()];
        let first = first_live(g.kind, hit.boundary.tokens());
        let taken = hashes.get(first.as_usize()..hit.boundary.as_usize()).unwrap_or_default();
        let claimed = |hash: &&BlockHash| {
            let block = g.index.get(**hash);
            block.is_none_or(|b| g.metas[b.index()].state == State::Evictable)
        };
        Blocks(u32::try_from(taken.iter().filter(claimed).count()).unwrap_or(u32::MAX))
    }

    /// Takes the blocks of a hit, one prefix per group. What lies in the memory behind the cache gets a
    /// block, minted frugally or not, and a copy that is listed.
    ///
    /// # Errors
    /// When a block for one that is brought back cannot be minted; nothing is held then.
    pub fn acquire(
        &mut self,
        hashes: &[BlockHash],
        hit: Hit,
        frugal: bool,
    ) -> Result<Vec<Prefix>, Shortage> {
        let boundary = hit.boundary.as_usize().min(hashes.len());
        let mut prefixes = Vec::with_capacity(self.groups.len());
        // First everything that is in the cache: minting must not evict any of it.
        let mut absent = Vec::new();
        for i in 0..self.groups.len() {
            let group = GroupId(u8::try_from(i).unwrap_or(u8::MAX));
            let first = first_live(self.groups[i].kind, hit.boundary.tokens());
            let wanted = hashes.get(first.as_usize()..boundary).unwrap_or_default();
            let mut blocks = Vec::with_capacity(wanted.len());
            for (nth, hash) in wanted.iter().enumerate() {
                if let Some(block) = self.take_cached(group, *hash) {
                    blocks.push(block);
                } else if let Some(at) = self.pin(group, *hash) {
                    absent.push(Absent { group, nth, hash: *hash, at });
                } else {
                    debug_assert!(false, "the hit is no longer there");
                }
            }
            prefixes.push(Prefix { group, skipped: first, blocks });
        }
        match self.bring_back(&absent, &mut prefixes, frugal) {
            Ok(()) => Ok(prefixes),
            Err(short) => {
                for block in prefixes.into_iter().rev().flat_map(|p| p.blocks.into_iter().rev()) {
                    self.release(block);
                }
                Err(short)
            }
        }
    }

    /// Finds a block behind the cache; what is minted for others of its hit will not overwrite it.
    fn pin(&mut self, group: GroupId, hash: BlockHash) -> Option<TierSlot> {
        let tier = self.groups[group.index()].tier.as_mut()?;
        tier.find(hash).inspect(|at| tier.pin(*at))
    }

    /// Mints a block for each that is absent, lists the copy and puts it in its place of its prefix.
    fn bring_back(
        &mut self,
        absent: &[Absent],
        prefixes: &mut [Prefix],
        frugal: bool,
    ) -> Result<(), Shortage> {
        let mut short = None;
        for Absent { group, nth, hash, at } in absent.iter().copied() {
            let minted = match (short, frugal) {
                (Some(short), _) => Err(short),
                (None, true) => self.mint_frugally(group),
                (None, false) => self.mint(group),
            };
            // The copy out of it is listed before any that is to overwrite it.
            if let Ok(block) = &minted {
                self.copies.push(SlotOp::Load { at, block: block.write_slot() });
            }
            if let Some(tier) = &mut self.groups[group.index()].tier {
                tier.unpin(at);
            }
            match minted {
                Ok(block) => {
                    let block = self.seal(block, hash);
                    prefixes[group.index()].blocks.insert(nth, block);
                }
                Err(shortage) => short = Some(shortage),
            }
        }
        short.map_or(Ok(()), Err)
    }

    fn take_cached(&mut self, group: GroupId, hash: BlockHash) -> Option<SharedBlock> {
        let g = &mut self.groups[group.index()];
        let block = g.index.get(hash)?;
        let meta = &mut g.metas[block.index()];
        match meta.state {
            State::Shared => {}
            State::Waiting => {
                g.waiting.remove(&mut g.links, block.0);
                g.shared += 1;
            }
            State::Evictable => {
                g.evictable.remove(&mut g.links, block.0);
                g.shared += 1;
                self.supers.hold(group, block);
            }
            State::Free | State::Owned | State::Limbo => {
                debug_assert!(false, "an indexed block is {:?}", meta.state);
                return None;
            }
        }
        meta.state = State::Shared;
        meta.refs += 1;
        Some(SharedBlock::new(group, block))
    }
}

/// The longest boundary whose window is present in a sliding group.
fn window_boundary(
    group: &Group,
    hashes: &[BlockHash],
    present: impl Fn(BlockHash) -> bool,
) -> usize {
    // Walk from the right, keeping the right end of the run of present blocks.
    let mut end = hashes.len();
    let mut at = end;
    while end > 0 {
        let boundary = Blocks(u32::try_from(end).unwrap_or(u32::MAX));
        if at <= first_live(group.kind, boundary.tokens()).as_usize() {
            return end;
        }
        at -= 1;
        if !present(hashes[at]) {
            end = at;
        }
    }
    0
}
