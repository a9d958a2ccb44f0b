//! From block hash to block, for one group: open addressing with linear probing.
//!
//! The hashes are BLAKE3 output, so their low bits are the probe start and nothing is hashed
//! again. Sized once for every block of the group at load one half or less; never allocates later.
//! It does not decide what is indexed. Invariant: each indexed block has one entry, and the entry
//! is reachable from its hash without an empty cell between.

use ids::{BlockHash, BlockId};

const EMPTY: u32 = u32::MAX;

#[derive(Debug)]
pub(crate) struct Index {
    cells: Vec<u32>,
    hashes: Vec<BlockHash>,
    len: u32,
}

impl Index {
    /// An index that can hold all of `blocks` blocks.
    pub(crate) fn new(blocks: usize) -> Self {
        let cells = (blocks * 2).next_power_of_two().max(2);
        Self { cells: vec![EMPTY; cells], hashes: vec![BlockHash(0); blocks], len: 0 }
    }

    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    pub(crate) fn get(&self, hash: BlockHash) -> Option<BlockId> {
        let cell = self.cells[self.find(hash)];
        (cell != EMPTY).then_some(BlockId(cell))
    }

    /// The name that an indexed block has; of any other what it had last.
    pub(crate) fn name(&self, block: BlockId) -> BlockHash {
        self.hashes[block.index()]
    }

    /// Names `block`; the hash must not be present.
    pub(crate) fn insert(&mut self, hash: BlockHash, block: BlockId) {
        let at = self.find(hash);
        debug_assert_eq!(self.cells[at], EMPTY, "a hash is indexed once");
        self.cells[at] = block.0;
        self.hashes[block.index()] = hash;
        self.len += 1;
    }

    /// Forgets the name of an indexed block.
    pub(crate) fn remove(&mut self, block: BlockId) {
        let mask = self.cells.len() - 1;
        let mut hole = self.find(self.hashes[block.index()]);
        if self.cells[hole] != block.0 {
            debug_assert!(false, "block {block} is not indexed");
            return;
        }
        self.len -= 1;
        // Close the gap: move back every later entry of the run that may not lie behind the hole.
        let mut at = hole;
        loop {
            at = (at + 1) & mask;
            let cell = self.cells[at];
            if cell == EMPTY {
                break;
            }
            let home = self.start(self.hashes[cell as usize]);
            if (at.wrapping_sub(home) & mask) >= (at.wrapping_sub(hole) & mask) {
                self.cells[hole] = cell;
                hole = at;
            }
        }
        self.cells[hole] = EMPTY;
    }

    fn start(&self, hash: BlockHash) -> usize {
        hash.0 as usize & (self.cells.len() - 1)
    }

    /// The cell of `hash`, or the empty cell where it would go.
    fn find(&self, hash: BlockHash) -> usize {
        let mask = self.cells.len() - 1;
        let mut at = self.start(hash);
        loop {
            let cell = self.cells[at];
            if cell == EMPTY || self.hashes[cell as usize] == hash {
                return at;
            }
            at = (at + 1) & mask;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use std::collections::btree_map::Entry;

    proptest! {
        #[test]
        fn behaves_as_a_map(ops in prop::collection::vec((0_u32..24, 0_u128..40), 1..400)) {
            let mut index = Index::new(24);
            let mut model: BTreeMap<u128, u32> = BTreeMap::new();
            for (block, hash) in ops {
                // Few distinct low bits, so that runs collide and wrap.
                let hash = (hash << 62) | (hash % 3);
                let named = model.iter().find(|(_, b)| **b == block).map(|(h, _)| *h);
                if let Some(old) = named {
                    index.remove(BlockId(block));
                    model.remove(&old);
                } else if let Entry::Vacant(entry) = model.entry(hash) {
                    index.insert(BlockHash(hash), BlockId(block));
                    entry.insert(block);
                }
                prop_assert_eq!(index.len() as usize, model.len());
                for h in 0_u128..40 {
                    let h = (h << 62) | (h % 3);
                    prop_assert_eq!(index.get(BlockHash(h)).map(|b| b.0), model.get(&h).copied());
                }
            }
        }
    }
}
