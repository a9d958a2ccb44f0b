//! The KV blocks of one request, per group, in logical order: skipped, then shared, then writable.
//!
//! It does not decide when blocks are taken or given up. Invariant: blocks before `sealed()` are
//! read-only, all groups are sealed up to the same block, and at most `capacity()` tokens fit.

use ids::{BLOCK_TOKENS, BlockHash, Blocks, GroupId, HashKey, Tokens};
use kv_cache::{Buried, KvCache, Prefix, SharedBlock, Shortage, WritableBlock, first_live};
use std::collections::VecDeque;
use step::{GroupTable, WriteSlot};

use crate::job::Job;

#[derive(Debug, Default)]
struct GroupBlocks {
    skipped: u32,
    shared: VecDeque<SharedBlock>,
    writable: VecDeque<WritableBlock>,
}

impl GroupBlocks {
    fn sealed(&self) -> u32 {
        self.skipped + count(self.shared.len())
    }

    fn end(&self) -> u32 {
        self.sealed() + count(self.writable.len())
    }
}

/// Every block of one request.
#[derive(Debug)]
pub struct Tables {
    groups: Vec<GroupBlocks>,
}

impl Tables {
    /// Tables that start with a shared prefix; `most` blocks are expected in all.
    pub(crate) fn new(prefixes: Vec<Prefix>, most: Blocks) -> Self {
        // Room for the whole table, so that no step allocates for it.
        let group = |prefix: Prefix| {
            let mut shared = VecDeque::from(prefix.blocks);
            shared.reserve(most.as_usize().saturating_sub(shared.len()));
            GroupBlocks { skipped: prefix.skipped.0, shared, writable: VecDeque::with_capacity(8) }
        };
        Self { groups: prefixes.into_iter().map(group).collect() }
    }

    /// The shared prefix as an admission carries it.
    pub(crate) fn admit(&self) -> Vec<GroupTable> {
        let table = |(i, g): (usize, &GroupBlocks)| GroupTable {
            group: group_id(i),
            skipped: g.skipped,
            blocks: g.shared.iter().map(SharedBlock::id).collect(),
        };
        self.groups.iter().enumerate().map(table).collect()
    }

    /// Tokens that have a block in every group.
    pub(crate) fn capacity(&self) -> Tokens {
        Blocks(self.groups.iter().map(GroupBlocks::end).min().unwrap_or(0)).tokens()
    }

    /// Blocks of one group held now.
    pub(crate) fn held(&self, group: GroupId) -> Blocks {
        let held = self.groups.get(group.index()).map_or(0, |g| g.end() - g.skipped);
        Blocks(held)
    }

    /// Mints until `tokens` have a block in every group, one logical block after another so that
    /// no group runs ahead; what was minted is added to `minted` and stays also on failure.
    pub(crate) fn extend(
        &mut self,
        cache: &mut KvCache,
        tokens: Tokens,
        frugal: bool,
        minted: &mut Vec<WriteSlot>,
    ) -> Result<(), Shortage> {
        for logical in self.capacity().blocks_full().0..tokens.blocks_ceil().0 {
            for (i, g) in self.groups.iter_mut().enumerate() {
                if g.end() <= logical {
                    let id = group_id(i);
                    let block = if frugal { cache.mint_frugally(id) } else { cache.mint(id) }?;
                    minted.push(block.write_slot());
                    g.writable.push_back(block);
                }
            }
        }
        Ok(())
    }

    /// Seals every block whose tokens all have confirmed KV.
    pub(crate) fn seal(
        &mut self,
        cache: &mut KvCache,
        computed: Tokens,
        job: &mut Job,
        key: &HashKey,
    ) {
        let sealed = self.groups.first().map_or(0, GroupBlocks::sealed);
        for logical in sealed..computed.blocks_full().0 {
            let hash: BlockHash = job.hash(key, logical as usize);
            for g in &mut self.groups {
                if let Some(block) = g.writable.pop_front() {
                    g.shared.push_back(cache.seal(block, hash));
                }
            }
        }
    }

    /// Gives up what no query from position `computed` on can read; calls `trimmed` with each
    /// group that lost blocks and its first live block.
    pub(crate) fn trim(
        &mut self,
        cache: &mut KvCache,
        computed: Tokens,
        mut trimmed: impl FnMut(GroupId, u32),
    ) {
        for (i, g) in self.groups.iter_mut().enumerate() {
            let live = first_live(cache.kind(group_id(i)), computed).0.min(g.end());
            if live <= g.skipped {
                continue;
            }
            while g.skipped < live {
                if let Some(block) = g.shared.pop_front() {
                    cache.release(block);
                } else if let Some(block) = g.writable.pop_front() {
                    cache.discard(block);
                }
                g.skipped += 1;
            }
            trimmed(group_id(i), live);
        }
    }

    /// Gives back up to `most` blocks, each group's tail first so that children are evicted before
    /// their parents. Returns how many; fewer than `most` means that nothing is left.
    pub(crate) fn release_tail(&mut self, cache: &mut KvCache, most: u32) -> u32 {
        let mut released = 0;
        for g in self.groups.iter_mut().rev() {
            while released < most {
                if let Some(block) = g.writable.pop_back() {
                    cache.discard(block);
                } else if let Some(block) = g.shared.pop_back() {
                    cache.release(block);
                } else {
                    break;
                }
                released += 1;
            }
        }
        released
    }

    /// Drops the handles to a cache that is gone.
    pub(crate) fn void(self, buried: &Buried) {
        for g in self.groups {
            g.shared.into_iter().for_each(|block| block.void(buried));
            g.writable.into_iter().for_each(|block| block.void(buried));
        }
    }
}

/// Blocks of each group that `tokens` tokens occupy at once when they are run a block at a time.
pub(crate) fn peak(cache: &KvCache, tokens: Tokens) -> Vec<Blocks> {
    let of_group = |i| {
        let all = tokens.blocks_ceil();
        match cache.kind(group_id(i)) {
            step::GroupKind::Full => all,
            // The window of the block's first query, and the block itself.
            step::GroupKind::Sliding { window } => {
                let before = window.0.saturating_sub(1).div_ceil(BLOCK_TOKENS);
                all.min(Blocks(before.saturating_add(1)))
            }
        }
    };
    (0..cache.groups()).map(of_group).collect()
}

pub(crate) fn group_id(i: usize) -> GroupId {
    GroupId(u8::try_from(i).unwrap_or(u8::MAX))
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
