//! A slot's block tables: where in the arena each logical block of each group lies.
//!
//! Carving is arithmetic, checked once per block when it enters a table; after that an offset is
//! known to lie inside the arena. It owns no memory of the cache.

use crate::copies::{BlockCopy, Way};
use crate::{EngineError, PlanError};
use ids::{BLOCK_TOKENS, BlockId, GroupId, SlotId, TierSlot, Tokens};
use step::{Carving, GroupKind, GroupSpec};

/// The offset of a block that was given up or never read. Using it is out of every bound.
const DEAD: u64 = u64::MAX;

/// Turns block ids into element offsets.
#[derive(Debug)]
pub(crate) struct Carver {
    groups: Vec<CarvedGroup>,
    /// Places behind the cache, in each group.
    places: u32,
    /// Bytes of all of them.
    host_bytes: u64,
}

#[derive(Debug)]
struct CarvedGroup {
    kind: GroupKind,
    blocks: u64,
    per_super: u64,
    super_elements: u64,
    block_elements: u64,
    /// Where the group's places begin behind the cache.
    host_elements: u64,
}

impl Carver {
    /// Checks a carving against the groups and the cache.
    pub(crate) fn new(
        carving: &Carving,
        groups: &[GroupSpec],
        (cache_bytes, host_bytes): (u64, u64),
        alignment: u64,
        element: u64,
    ) -> Result<Self, EngineError> {
        let wrong = |text: String| Err(EngineError::Carving(text));
        if carving.per_super.len() != groups.len() {
            let (got, wanted) = (carving.per_super.len(), groups.len());
            return wrong(format!("{got} groups are carved, the model has {wanted}"));
        }
        let super_bytes = carving.super_bytes.0;
        let total = super_bytes.checked_mul(u64::from(carving.supers));
        if total.is_none_or(|total| total > cache_bytes) {
            let supers = carving.supers;
            return wrong(format!(
                "{supers} super-blocks of {super_bytes} bytes exceed the cache of {cache_bytes}"
            ));
        }
        if !super_bytes.is_multiple_of(alignment) {
            return wrong(format!(
                "super-blocks of {super_bytes} bytes are not aligned to {alignment}"
            ));
        }
        let (places, mut behind) = (u64::from(carving.host_blocks), 0_u64);
        let mut carved = Vec::with_capacity(groups.len());
        for (group, &per_super) in groups.iter().zip(&carving.per_super) {
            let per_super = u64::from(per_super);
            let used = group.block_bytes.0.checked_mul(per_super);
            if per_super == 0 || used.is_none_or(|used| used > super_bytes) {
                return wrong(format!(
                    "{per_super} blocks of group {} do not fit a super-block of {super_bytes} bytes",
                    group.group
                ));
            }
            carved.push(CarvedGroup {
                kind: group.kind,
                blocks: per_super * u64::from(carving.supers),
                per_super,
                super_elements: super_bytes / element,
                block_elements: group.block_bytes.0 / element,
                host_elements: behind / element,
            });
            behind = group.block_bytes.0.saturating_mul(places).saturating_add(behind);
        }
        if behind > host_bytes {
            return wrong(format!(
                "{places} blocks of each group take {behind} bytes behind the cache, where there are \
                 {host_bytes}"
            ));
        }
        Ok(Self { groups: carved, places: carving.host_blocks, host_bytes: behind })
    }

    /// Bytes of the blocks behind the cache.
    pub(crate) fn host_bytes(&self) -> u64 {
        self.host_bytes
    }

    /// The copy of a block to or from a place behind the cache.
    pub(crate) fn copy(
        &self,
        way: Way,
        group: GroupId,
        block: BlockId,
        at: TierSlot,
    ) -> Result<BlockCopy, PlanError> {
        let cache = self.offset(group, block)? as usize;
        if at.0 >= self.places {
            return Err(PlanError::NoPlace { group, at, places: self.places });
        }
        let carved = &self.groups[group.index()];
        let host = (carved.host_elements + u64::from(at.0) * carved.block_elements) as usize;
        Ok(BlockCopy { way, cache, host, len: carved.block_elements as usize })
    }

    /// Groups.
    pub(crate) fn groups(&self) -> usize {
        self.groups.len()
    }

    fn offset(&self, group: GroupId, block: BlockId) -> Result<u64, PlanError> {
        let carved = self.groups.get(group.index()).ok_or(PlanError::NoGroup(group))?;
        let index = u64::from(block.0);
        if index >= carved.blocks {
            return Err(PlanError::NoBlock { group, block });
        }
        let (outer, inner) = (index / carved.per_super, index % carved.per_super);
        Ok(outer * carved.super_elements + inner * carved.block_elements)
    }

    /// The first logical block that attention reads when it starts at `position`.
    fn first_read(&self, group: usize, position: Tokens) -> u32 {
        match self.groups[group].kind {
            GroupKind::Full => 0,
            GroupKind::Sliding { window } => {
                (position.0 + 1).saturating_sub(window.0) / BLOCK_TOKENS
            }
        }
    }
}

/// The tables of one slot, one per group.
#[derive(Debug)]
pub(crate) struct Tables {
    groups: Vec<Table>,
}

#[derive(Debug)]
struct Table {
    offsets: Vec<u64>,
    live_from: u32,
}

impl Tables {
    /// Empty tables with room for `blocks` blocks each, so that growing never allocates.
    pub(crate) fn with_capacity(groups: usize, blocks: usize) -> Self {
        let table = || Table { offsets: Vec::with_capacity(blocks), live_from: 0 };
        Self { groups: (0..groups).map(|_| table()).collect() }
    }

    /// Element offsets of the logical blocks of a group.
    pub(crate) fn offsets(&self, group: usize) -> &[u64] {
        &self.groups[group].offsets
    }

    pub(crate) fn clear(&mut self) {
        for table in &mut self.groups {
            table.offsets.clear();
            table.live_from = 0;
        }
    }

    /// The first `skipped` logical blocks of a group will never be read.
    pub(crate) fn skip(
        &mut self,
        slot: SlotId,
        group: GroupId,
        skipped: u32,
    ) -> Result<(), PlanError> {
        let table = self.groups.get_mut(group.index()).ok_or(PlanError::NoGroup(group))?;
        if table.offsets.len() + skipped as usize > table.offsets.capacity() {
            return Err(PlanError::TableFull { slot, group });
        }
        table.offsets.resize(table.offsets.len() + skipped as usize, DEAD);
        table.live_from = skipped;
        Ok(())
    }

    pub(crate) fn push(
        &mut self,
        carver: &Carver,
        slot: SlotId,
        group: GroupId,
        block: BlockId,
    ) -> Result<(), PlanError> {
        let offset = carver.offset(group, block)?;
        let table = &mut self.groups[group.index()];
        if table.offsets.len() == table.offsets.capacity() {
            return Err(PlanError::TableFull { slot, group });
        }
        table.offsets.push(offset);
        Ok(())
    }

    pub(crate) fn trim(&mut self, group: GroupId, first_live: u32) -> Result<(), PlanError> {
        let table = self.groups.get_mut(group.index()).ok_or(PlanError::NoGroup(group))?;
        let end = (first_live as usize).min(table.offsets.len());
        let start = (table.live_from as usize).min(end);
        table.offsets[start..end].fill(DEAD);
        table.live_from = table.live_from.max(first_live);
        Ok(())
    }

    /// Whether tokens `from..reach` can be run: blocks to write to, and all that is read alive.
    pub(crate) fn check(
        &self,
        carver: &Carver,
        slot: SlotId,
        from: Tokens,
        reach: Tokens,
    ) -> Result<(), PlanError> {
        for (index, table) in self.groups.iter().enumerate() {
            let group = GroupId(index as u8);
            let room = Tokens(table.offsets.len() as u32 * BLOCK_TOKENS);
            if reach > room {
                return Err(PlanError::NoRoom { slot, group, reach, room });
            }
            let needed = carver.first_read(index, from);
            if needed < table.live_from {
                return Err(PlanError::Trimmed { slot, group, needed, live: table.live_from });
            }
        }
        Ok(())
    }
}
