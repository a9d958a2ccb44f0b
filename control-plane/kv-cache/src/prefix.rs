//! Finding and taking the longest cached prefix that every group supports.
//!
//! A full-attention group supports a boundary when every block before it is present; a sliding
//! group when the blocks holding the last `window - 1` tokens before it are. It does not limit the
//! hit to leave a token to compute: the caller asks for fewer hashes.
//! Invariant: a hit is a whole number of blocks and can be taken until the cache changes.

use crate::block::SharedBlock;
use crate::pool::{Group, KvCache, State};
use ids::{BlockHash, Blocks, GroupId, Tokens};
use step::GroupKind;

/// A boundary that every group supports now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    /// Blocks of the prompt before the boundary.
    pub boundary: Blocks,
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
        let mut most = hashes.len();
        for group in self.groups.iter().filter(|g| g.kind == GroupKind::Full) {
            let present = |hash: &BlockHash| group.index.get(*hash).is_some();
            most = hashes[..most].iter().take_while(|hash| present(hash)).count();
        }
        // A group may push the boundary back below what another supports, so repeat until none
        // does; every round but the last shortens it.
        loop {
            let before = most;
            for group in &self.groups {
                if let GroupKind::Sliding { .. } = group.kind {
                    most = window_boundary(group, &hashes[..most]);
                }
            }
            if most == before {
                return Hit { boundary: Blocks(u32::try_from(most).unwrap_or(u32::MAX)) };
            }
        }
    }

    /// Blocks of a hit that count as mintable in the group, because nobody references them.
    #[must_use]
    pub fn evictable_of(&self, group: GroupId, hashes: &[BlockHash], hit: Hit) -> Blocks {
        let g = &self.groups[group.index()];
        let first = first_live(g.kind, hit.boundary.tokens());
        let taken = hashes.get(first.as_usize()..hit.boundary.as_usize()).unwrap_or_default();
        let evictable = |hash: &&BlockHash| {
            let block = g.index.get(**hash);
            block.is_some_and(|b| g.metas[b.index()].state == State::Evictable)
        };
        Blocks(u32::try_from(taken.iter().filter(evictable).count()).unwrap_or(u32::MAX))
    }

    /// Takes the blocks of a hit, one prefix per group.
    pub fn acquire(&mut self, hashes: &[BlockHash], hit: Hit) -> Vec<Prefix> {
        let boundary = hit.boundary.as_usize().min(hashes.len());
        let mut prefixes = Vec::with_capacity(self.groups.len());
        for i in 0..self.groups.len() {
            let group = GroupId(u8::try_from(i).unwrap_or(u8::MAX));
            let first = first_live(self.groups[i].kind, hit.boundary.tokens());
            let wanted = hashes.get(first.as_usize()..boundary).unwrap_or_default();
            let mut blocks = Vec::with_capacity(wanted.len());
            for hash in wanted {
                blocks.extend(self.take_cached(group, *hash));
            }
            debug_assert_eq!(blocks.len(), wanted.len(), "the hit is no longer there");
            prefixes.push(Prefix { group, skipped: first, blocks });
        }
        prefixes
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
fn window_boundary(group: &Group, hashes: &[BlockHash]) -> usize {
    // Walk from the right, keeping the right end of the run of present blocks.
    let mut end = hashes.len();
    let mut at = end;
    while end > 0 {
        let boundary = Blocks(u32::try_from(end).unwrap_or(u32::MAX));
        if at <= first_live(group.kind, boundary.tokens()).as_usize() {
            return end;
        }
        at -= 1;
        if group.index.get(hashes[at]).is_none() {
            end = at;
        }
    }
    0
}
