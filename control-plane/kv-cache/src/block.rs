//! The two handles to a KV block. They carry no data: what they prove is who may write.
//!
//! Neither can be cloned or made outside of this crate. A handle that is dropped instead of given
//! back would lose the block for good, so debug builds stop there.

use ids::{BlockId, GroupId};
use step::WriteSlot;

/// The right to write one block. Unique: while it exists nobody else holds the block.
#[must_use = "a writable block is sealed or given back to the cache"]
#[derive(Debug)]
pub struct WritableBlock {
    group: GroupId,
    block: BlockId,
}

/// The right to read one sealed block, one count of possibly many.
#[must_use = "a shared block is given back to the cache"]
#[derive(Debug)]
pub struct SharedBlock {
    group: GroupId,
    block: BlockId,
}

/// Proof that a cache is gone, and with it every block it had: handles to it may be dropped.
#[derive(Debug)]
pub struct Buried(());

impl Buried {
    pub(crate) fn new() -> Self {
        Self(())
    }
}

impl WritableBlock {
    pub(crate) fn new(group: GroupId, block: BlockId) -> Self {
        Self { group, block }
    }

    /// What goes into a plan so that a worker may write the block.
    #[must_use]
    pub fn write_slot(&self) -> WriteSlot {
        WriteSlot { group: self.group, block: self.block }
    }

    /// Drops a handle to a cache that is gone.
    pub fn void(self, _: &Buried) {
        self.into_id();
    }

    pub(crate) fn into_id(self) -> (GroupId, BlockId) {
        let id = (self.group, self.block);
        core::mem::forget(self);
        id
    }
}

impl SharedBlock {
    pub(crate) fn new(group: GroupId, block: BlockId) -> Self {
        Self { group, block }
    }

    /// The block, for the table of a slot that reads it.
    #[must_use]
    pub fn id(&self) -> BlockId {
        self.block
    }

    /// The group it belongs to.
    #[must_use]
    pub fn group(&self) -> GroupId {
        self.group
    }

    /// Drops a handle to a cache that is gone.
    pub fn void(self, _: &Buried) {
        self.into_id();
    }

    pub(crate) fn into_id(self) -> (GroupId, BlockId) {
        let id = (self.group, self.block);
        core::mem::forget(self);
        id
    }
}

impl Drop for WritableBlock {
    fn drop(&mut self) {
        lost("writable", self.group, self.block);
    }
}

impl Drop for SharedBlock {
    fn drop(&mut self) {
        lost("shared", self.group, self.block);
    }
}

fn lost(kind: &str, group: GroupId, block: BlockId) {
    debug_assert!(
        std::thread::panicking(),
        "{kind} block {block} of group {group} was dropped, not given back"
    );
}
