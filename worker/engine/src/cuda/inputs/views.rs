//! The parts of a step's inputs as kernels see them: slices of device memory, for steps of one bucket.
//!
//! They are cut once and written by what is sent. Invariant: a view lies where its layout says.

use super::layout::Layout;
use core::ops::Range;
use device::cuda::DeviceSlice;
use ops::mla::cuda::expand::later::PASS_WORDS;
use ops::tokens::cuda::CHANGE_WORDS;

/// Prompts of an attention that run apart; empty where none do.
pub(in crate::cuda) struct PromptViews {
    pub(in crate::cuda) tile_count: DeviceSlice,
    pub(in crate::cuda) tiles: DeviceSlice,
    /// Of those whose keys are rows of the step.
    pub(in crate::cuda) segments: DeviceSlice,
    pub(in crate::cuda) later: LaterViews,
}

/// Prompts whose keys are gathered, of all passes.
pub(in crate::cuda) struct LaterViews {
    passes: DeviceSlice,
    pub(in crate::cuda) segments: DeviceSlice,
    pub(in crate::cuda) firsts: DeviceSlice,
    pub(in crate::cuda) tiles: DeviceSlice,
}

impl LaterViews {
    /// Which are those of pass number `index`.
    pub(in crate::cuda) fn pass(&self, index: usize) -> DeviceSlice {
        self.passes.slice(index * PASS_WORDS * 4..(index + 1) * PASS_WORDS * 4)
    }
}

/// The parts on the device, for steps of one bucket.
pub(in crate::cuda) struct Views {
    pub(in crate::cuda) bucket: usize,
    pub(super) layout: Layout,
    pub(in crate::cuda) count: DeviceSlice,
    pub(in crate::cuda) ids: DeviceSlice,
    pub(in crate::cuda) positions: DeviceSlice,
    pub(in crate::cuda) wanted: DeviceSlice,
    /// How many are.
    pub(in crate::cuda) wanted_count: DeviceSlice,
    pub(in crate::cuda) row_tables: Vec<DeviceSlice>,
    pub(in crate::cuda) segments: Vec<DeviceSlice>,
    /// How many, and which.
    pub(in crate::cuda) tiles: Vec<(DeviceSlice, DeviceSlice)>,
    /// Pieces, and their slots.
    pub(in crate::cuda) pieces: Vec<[DeviceSlice; 2]>,
    /// Prompts that run apart, by attention.
    pub(in crate::cuda) prompts: Vec<PromptViews>,
    /// Rows up to the last one of any segment that is not expanded.
    pub(in crate::cuda) absorbed: DeviceSlice,
    /// Real rows of each tile of logits.
    pub(in crate::cuda) heads: Vec<DeviceSlice>,
    pub(in crate::cuda) how: DeviceSlice,
    pub(in crate::cuda) kept: DeviceSlice,
    pub(in crate::cuda) changed: DeviceSlice,
    pub(in crate::cuda) changes: DeviceSlice,
    pub(in crate::cuda) tables: DeviceSlice,
}

impl Views {
    pub(super) fn new(
        layout: Layout,
        bucket: usize,
        device: &DeviceSlice,
        tables: &DeviceSlice,
    ) -> Self {
        let words = |range: &Range<usize>| device.slice(range.start * 4..range.end * 4);
        let word = |at: usize| device.slice(at * 4..at * 4 + 4);
        let changes = layout.changes * 4;
        Self {
            bucket,
            count: word(layout.count),
            ids: words(&layout.ids),
            positions: words(&layout.positions),
            wanted: words(&layout.wanted),
            wanted_count: word(layout.wanted_count),
            row_tables: layout.row_tables.iter().map(words).collect(),
            segments: layout.segments.iter().map(words).collect(),
            tiles: layout.tiles.iter().map(|(at, list)| (word(*at), words(list))).collect(),
            pieces: layout.pieces.iter().map(|parts| parts.each_ref().map(words)).collect(),
            prompts: (layout.prompts.iter())
                .map(|of| PromptViews {
                    tile_count: words(&of.count),
                    tiles: words(&of.tiles),
                    segments: words(&of.segments),
                    later: LaterViews {
                        passes: words(&of.later.passes),
                        segments: words(&of.later.segments),
                        firsts: words(&of.later.firsts),
                        tiles: words(&of.later.tiles),
                    },
                })
                .collect(),
            absorbed: word(layout.absorbed),
            heads: layout.heads.clone().map(word).collect(),
            how: words(&layout.how),
            kept: words(&layout.kept),
            changed: word(layout.changed),
            changes: device.slice(changes..changes + layout.most_changes * 4 * CHANGE_WORDS),
            tables: tables.clone(),
            layout,
        }
    }
}
