//! What runs a batch. The engine decides nothing about how; an executor nothing about what.

use crate::batch::Batch;
use crate::slots::Slots;

/// Where the block tables of a batch's slots are found.
pub struct TableView<'a> {
    slots: &'a Slots,
}

impl<'a> TableView<'a> {
    pub(crate) const fn new(slots: &'a Slots) -> Self {
        Self { slots }
    }

    /// Element offsets of the logical blocks of `slot` in a cache group.
    #[must_use]
    pub fn offsets(&self, slot: ids::SlotId, group: usize) -> &'a [u64] {
        self.slots.row(slot).tables.offsets(group)
    }
}

/// Runs batches of one model on one device.
pub trait Executor {
    /// All rows through the model; their KV is written, their hidden states kept until the next
    /// call.
    fn forward(&mut self, batch: &Batch, tables: &TableView<'_>);

    /// Logits of some rows of the last forward, `[rows, vocab]`; at most [`Executor::tile`] rows.
    fn logits(&mut self, rows: &[u32]) -> &mut [f32];

    /// Most rows of one call of [`Executor::logits`].
    fn tile(&self) -> usize;
}
