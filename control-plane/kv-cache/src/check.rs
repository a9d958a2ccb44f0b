//! A full recount of a cache, for tests and simulations: slow, obvious, independent of counters.

use crate::pool::{Counts, KvCache, State};
use ids::{BlockId, Blocks, GroupId};

/// A count that does not agree with what is there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("group {group}: {what} is {counted}, recounted {found}")]
pub struct Imbalance {
    /// The group.
    pub group: GroupId,
    /// The figure.
    pub what: &'static str,
    /// As kept.
    pub counted: u32,
    /// As found.
    pub found: u32,
}

impl KvCache {
    /// The constant-time part: the kinds of blocks add up to what is bound to the group.
    ///
    /// # Errors
    /// The first group that does not add up.
    pub fn check_totals(&self) -> Result<(), Imbalance> {
        let mut bound = 0;
        for i in 0..self.groups.len() {
            let group = GroupId(u8::try_from(i).unwrap_or(u8::MAX));
            let all = self.supers.bound_blocks(group);
            equal(group, "total", self.counts(group).total().0, all)?;
            bound += all / self.supers.per_super(group).max(1);
        }
        equal(GroupId(0), "super-blocks", bound + self.supers.unbound(), self.supers.count())
    }

    /// Recounts every block, list, index entry and super-block.
    ///
    /// # Errors
    /// The first figure that differs.
    pub fn check(&self) -> Result<(), Imbalance> {
        self.check_totals()?;
        for (i, g) in self.groups.iter().enumerate() {
            let group = GroupId(u8::try_from(i).unwrap_or(u8::MAX));
            let count = |state| {
                let n = g.metas.iter().filter(|m| m.state == state).count();
                u32::try_from(n).unwrap_or(u32::MAX)
            };
            let kept = self.counts(group);
            let unbound_free = count(State::Free).saturating_sub(kept.free.0);
            let found = Counts {
                free: Blocks(count(State::Free) - unbound_free),
                owned: Blocks(count(State::Owned)),
                shared: Blocks(count(State::Shared)),
                cached: Blocks(count(State::Waiting) + count(State::Evictable)),
                limbo: Blocks(count(State::Limbo)),
            };
            let all = u32::try_from(g.metas.len()).unwrap_or(u32::MAX);
            equal(group, "free of unbound", unbound_free, all - self.supers.bound_blocks(group))?;
            equal(group, "free", kept.free.0, found.free.0)?;
            equal(group, "owned", kept.owned.0, found.owned.0)?;
            equal(group, "shared", kept.shared.0, found.shared.0)?;
            equal(group, "cached", kept.cached.0, found.cached.0)?;
            equal(group, "limbo", kept.limbo.0, found.limbo.0)?;
            for (list, state, what) in [
                (&g.limbo, State::Limbo, "limbo list"),
                (&g.waiting, State::Waiting, "waiting list"),
                (&g.evictable, State::Evictable, "evictable list"),
            ] {
                let members = list.iter(&g.links);
                let right = members.filter(|i| g.metas[*i as usize].state == state).count();
                equal(group, what, list.len(), u32::try_from(right).unwrap_or(u32::MAX))?;
                let stamps: Vec<_> =
                    list.iter(&g.links).map(|i| g.metas[i as usize].stamp).collect();
                equal(group, "stamps in order", 1, u32::from(stamps.is_sorted()))?;
            }
            let indexed = g.metas.iter().filter(|m| m.indexed).count();
            equal(group, "index", g.index.len(), u32::try_from(indexed).unwrap_or(u32::MAX))?;
            let cached_private = g
                .metas
                .iter()
                .any(|m| matches!(m.state, State::Waiting | State::Evictable) && !m.indexed);
            equal(group, "cached but not indexed", 0, u32::from(cached_private))?;
            if let Some(tier) = &g.tier {
                let (named, pinned) = tier.audit();
                equal(group, "blocks behind the cache", tier.len(), named)?;
                equal(group, "pinned behind the cache", pinned, 0)?;
            }
            let refs = g.metas.iter().any(|m| (m.refs > 0) != (m.state == State::Shared));
            equal(group, "references outside of shared", 0, u32::from(refs))?;
        }
        self.check_supers()
    }

    fn check_supers(&self) -> Result<(), Imbalance> {
        for at in 0..self.supers.count() {
            let (bound, free, held) = self.supers.audit(at);
            let Some(group) = bound else { continue };
            let per = self.supers.per_super(group);
            let states = (at * per..(at + 1) * per)
                .map(|b| self.groups[group.index()].metas[BlockId(b).index()].state);
            let (mut found_free, mut found_held) = (0, 0);
            for state in states {
                match state {
                    State::Free => found_free += 1,
                    State::Evictable => {}
                    State::Owned | State::Shared | State::Waiting | State::Limbo => {
                        found_held += 1;
                    }
                }
            }
            equal(group, "free in a super-block", free, found_free)?;
            equal(group, "held in a super-block", held, found_held)?;
        }
        Ok(())
    }
}

fn equal(group: GroupId, what: &'static str, counted: u32, found: u32) -> Result<(), Imbalance> {
    if counted == found { Ok(()) } else { Err(Imbalance { group, what, counted, found }) }
}
