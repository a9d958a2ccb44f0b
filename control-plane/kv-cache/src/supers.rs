//! Super-blocks: fixed pieces of the cache, each bound to one group until it is empty.
//!
//! Finds free blocks and gives super-blocks from group to group. It does not know why a block is
//! held. Invariant: a super-block with no held and no evictable block is bound to no group, so
//! memory never stays with a group that does not use it.

use crate::list::{Link, List, links};
use ids::{BlockId, GroupId};

const NONE: u32 = u32::MAX;

#[derive(Clone, Debug)]
struct Super {
    group: Option<GroupId>,
    /// Blocks below this were handed out at least once since the super-block was bound.
    touched: u32,
    /// Head of the list of blocks that came back, linked through `Supers::next_free`.
    free_head: u32,
    free: u32,
    /// Blocks neither free nor evictable.
    held: u32,
}

#[derive(Debug)]
struct GroupSupers {
    per_super: u32,
    bound: u32,
    free: u32,
    /// Bound super-blocks with a free block.
    partial: List,
    /// Bound super-blocks where everything that is not free may be evicted.
    idle: List,
    /// Next free block of the same super-block, by block.
    next_free: Vec<u32>,
}

#[derive(Debug)]
pub(crate) struct Supers {
    supers: Vec<Super>,
    groups: Vec<GroupSupers>,
    empty: Vec<u32>,
    partial_links: Vec<Link>,
    idle_links: Vec<Link>,
}

impl Supers {
    pub(crate) fn new(count: u32, per_super: &[u32]) -> Self {
        let unbound = Super { group: None, touched: 0, free_head: NONE, free: 0, held: 0 };
        let group = |per: &u32| GroupSupers {
            per_super: *per,
            bound: 0,
            free: 0,
            partial: List::default(),
            idle: List::default(),
            next_free: vec![NONE; count as usize * *per as usize],
        };
        Self {
            supers: vec![unbound; count as usize],
            groups: per_super.iter().map(group).collect(),
            // Popped from the end: low addresses first.
            empty: (0..count).rev().collect(),
            partial_links: links(count as usize),
            idle_links: links(count as usize),
        }
    }

    /// A free block of the group, which is held from now on; binds an empty super-block if needed.
    pub(crate) fn take(&mut self, group: GroupId) -> Option<BlockId> {
        let g = &mut self.groups[group.index()];
        let at = match g.partial.front() {
            Some(at) => at,
            None => {
                let at = self.empty.pop()?;
                let s = &mut self.supers[at as usize];
                *s = Super {
                    group: Some(group),
                    touched: 0,
                    free_head: NONE,
                    free: g.per_super,
                    held: 0,
                };
                g.bound += 1;
                g.free += g.per_super;
                g.partial.push_back(&mut self.partial_links, at);
                // Idle until the block below is held; keeps one rule for `hold`.
                g.idle.push_back(&mut self.idle_links, at);
                at
            }
        };
        let s = &mut self.supers[at as usize];
        let block = if s.free_head == NONE {
            s.touched += 1;
            at * g.per_super + s.touched - 1
        } else {
            let block = s.free_head;
            s.free_head = g.next_free[block as usize];
            block
        };
        s.free -= 1;
        g.free -= 1;
        if s.free == 0 {
            g.partial.remove(&mut self.partial_links, at);
        }
        let block = BlockId(block);
        self.hold(group, block);
        Some(block)
    }

    /// An evictable block becomes held.
    pub(crate) fn hold(&mut self, group: GroupId, block: BlockId) {
        let g = &mut self.groups[group.index()];
        let at = block.0 / g.per_super;
        let s = &mut self.supers[at as usize];
        if s.held == 0 {
            g.idle.remove(&mut self.idle_links, at);
        }
        s.held += 1;
    }

    /// A held block becomes evictable.
    pub(crate) fn unhold(&mut self, group: GroupId, block: BlockId) {
        let g = &mut self.groups[group.index()];
        let at = block.0 / g.per_super;
        let s = &mut self.supers[at as usize];
        s.held -= 1;
        if s.held == 0 {
            g.idle.push_back(&mut self.idle_links, at);
        }
    }

    /// An evictable block becomes free. Unbinds its super-block when that was the last in use.
    pub(crate) fn put(&mut self, group: GroupId, block: BlockId) {
        let g = &mut self.groups[group.index()];
        let at = block.0 / g.per_super;
        let s = &mut self.supers[at as usize];
        g.next_free[block.index()] = s.free_head;
        s.free_head = block.0;
        if s.free == 0 {
            // At the front: fill what is in use before touching the next.
            g.partial.push_front(&mut self.partial_links, at);
        }
        s.free += 1;
        g.free += 1;
        if s.free == g.per_super {
            g.partial.remove(&mut self.partial_links, at);
            g.idle.remove(&mut self.idle_links, at);
            g.free -= g.per_super;
            g.bound -= 1;
            s.group = None;
            self.empty.push(at);
        }
    }

    /// The blocks of a super-block of another group that holds nothing but evictable blocks.
    pub(crate) fn idle_elsewhere(&self, group: GroupId) -> Option<(GroupId, std::ops::Range<u32>)> {
        let others = self.groups.iter().enumerate().filter(|(i, _)| *i != group.index());
        let (i, at) = others.filter_map(|(i, g)| Some((i, g.idle.front()?))).next()?;
        let per = self.groups[i].per_super;
        Some((GroupId(u8::try_from(i).ok()?), at * per..(at + 1) * per))
    }

    /// Free blocks in the super-blocks bound to the group.
    pub(crate) fn free(&self, group: GroupId) -> u32 {
        self.groups[group.index()].free
    }

    /// Blocks of the super-blocks bound to the group.
    pub(crate) fn bound_blocks(&self, group: GroupId) -> u32 {
        let g = &self.groups[group.index()];
        g.bound * g.per_super
    }

    /// Blocks that one super-block holds in the group.
    pub(crate) fn per_super(&self, group: GroupId) -> u32 {
        self.groups[group.index()].per_super
    }

    /// All super-blocks.
    pub(crate) fn count(&self) -> u32 {
        u32::try_from(self.supers.len()).unwrap_or(u32::MAX)
    }

    /// Super-blocks bound to no group.
    pub(crate) fn unbound(&self) -> u32 {
        u32::try_from(self.empty.len()).unwrap_or(u32::MAX)
    }

    /// Super-blocks that the group could get, idle ones of other groups included.
    pub(crate) fn obtainable(&self, group: GroupId) -> u32 {
        let others = self.groups.iter().enumerate().filter(|(i, _)| *i != group.index());
        self.unbound() + others.map(|(_, g)| g.idle.len()).sum::<u32>()
    }

    /// Recounts one super-block: (free blocks, held, whether bound to `group`).
    pub(crate) fn audit(&self, at: u32) -> (Option<GroupId>, u32, u32) {
        let s = &self.supers[at as usize];
        (s.group, s.free, s.held)
    }
}
