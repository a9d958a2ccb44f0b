//! Which block lies where in the host's memory behind the cache, for one group: by hash, of fixed size,
//! what the cache has too and then the longest unused overwritten first.
//!
//! It copies nothing and lists no copy; [`crate::KvCache`] does, in the order of its decisions. It never
//! allocates later. Invariant: a hash names at most one place, and once every copy listed until then
//! was carried out in order, a place holds what the hash that names it stands for.

use crate::index::Index;
use crate::list::{Link, List, links};
use ids::{BlockHash, BlockId, TierSlot};

#[derive(Debug)]
pub(crate) struct Tier {
    index: Index,
    links: Vec<Link>,
    /// Places that may be overwritten: first those whose block was brought back, which the cache has
    /// too, then the longest unused.
    used: List,
    /// Places from here on were never used.
    fresh: u32,
    slots: u32,
    /// Named places that must be read before they may be overwritten.
    pinned: u32,
}

impl Tier {
    /// A tier of `slots` places, all empty.
    pub(crate) fn new(slots: u32) -> Self {
        Self {
            index: Index::new(slots as usize),
            links: links(slots as usize),
            used: List::default(),
            fresh: 0,
            slots,
            pinned: 0,
        }
    }

    /// Where a block lies.
    pub(crate) fn find(&self, hash: BlockHash) -> Option<TierSlot> {
        self.index.get(hash).map(|place| TierSlot(place.0))
    }

    /// A block leaves the cache. Returns the place that it must be copied to; `None` where it lies here
    /// already, which makes it the newest, or where every place is pinned.
    pub(crate) fn keep(&mut self, hash: BlockHash) -> Option<TierSlot> {
        if let Some(at) = self.find(hash) {
            self.used.remove(&mut self.links, at.0);
            self.used.push_back(&mut self.links, at.0);
            return None;
        }
        let at = if self.fresh < self.slots {
            self.fresh += 1;
            self.fresh - 1
        } else {
            let oldest = self.used.front()?;
            self.used.remove(&mut self.links, oldest);
            self.index.remove(BlockId(oldest));
            oldest
        };
        self.index.insert(hash, BlockId(at));
        self.used.push_back(&mut self.links, at);
        Some(TierSlot(at))
    }

    /// Keeps a place from being overwritten until [`Tier::unpin`]. Blocks that lie in the cache too are
    /// never pinned, so [`Tier::keep`] meets none.
    pub(crate) fn pin(&mut self, at: TierSlot) {
        self.used.remove(&mut self.links, at.0);
        self.pinned += 1;
    }

    /// The copy out of the place is listed, or will not be made. It is the first to be overwritten: the
    /// cache has its block, and together they hold more when others take its place.
    pub(crate) fn unpin(&mut self, at: TierSlot) {
        self.pinned -= 1;
        self.used.push_front(&mut self.links, at.0);
    }

    /// Places that hold a block.
    pub(crate) fn len(&self) -> u32 {
        self.index.len()
    }

    /// All places.
    pub(crate) fn slots(&self) -> u32 {
        self.slots
    }

    /// Recounts: (places that may be overwritten and are found under their names, pinned places).
    pub(crate) fn audit(&self) -> (u32, u32) {
        let found =
            |place: &u32| self.index.get(self.index.name(BlockId(*place))) == Some(BlockId(*place));
        let named = self.used.iter(&self.links).filter(found).count();
        (u32::try_from(named).unwrap_or(u32::MAX), self.pinned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(tier: &mut Tier, hash: u128) -> Option<u32> {
        tier.keep(BlockHash(hash)).map(|at| at.0)
    }

    #[test]
    fn the_longest_unused_place_is_overwritten_and_what_was_there_forgotten() {
        let mut tier = Tier::new(2);
        assert_eq!((kept(&mut tier, 1), kept(&mut tier, 2)), (Some(0), Some(1)));
        assert_eq!(kept(&mut tier, 1), None, "it lies there already, and is the newest now");
        assert_eq!(kept(&mut tier, 3), Some(1));
        assert_eq!(tier.find(BlockHash(2)), None);
        assert_eq!(tier.find(BlockHash(1)), Some(TierSlot(0)));
        assert_eq!((tier.len(), tier.audit()), (2, (2, 0)));
    }

    #[test]
    fn a_pinned_place_is_never_overwritten() {
        let mut tier = Tier::new(2);
        let (one, two) = (kept(&mut tier, 1), kept(&mut tier, 2));
        assert_eq!((one, two), (Some(0), Some(1)));
        tier.pin(TierSlot(0));
        assert_eq!(kept(&mut tier, 3), Some(1));
        tier.pin(TierSlot(1));
        assert_eq!(kept(&mut tier, 4), None, "there is no place for it");
        assert_eq!(tier.find(BlockHash(4)), None);
        tier.unpin(TierSlot(0));
        tier.unpin(TierSlot(1));
        assert_eq!(kept(&mut tier, 4), Some(1), "unpinned last");
        assert_eq!(tier.audit(), (2, 0));
    }
}
