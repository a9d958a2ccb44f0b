//! The activations' memory: one allocation, cut by offsets that the lowering planned.
//!
//! Invariant: an op's buffers are disjoint, which is checked on every borrow, not trusted.

use super::launch::Place;
use core::ops::Range;

/// Rows of a step on this rank.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rows {
    /// Tokens of this shard.
    pub(super) own: usize,
    /// Rows that every rank runs for each shard; not less.
    pub(super) padded: usize,
}

impl Rows {
    /// Rows that nothing pads.
    pub(super) const fn exactly(own: usize) -> Self {
        Self { own, padded: own }
    }

    /// Rows that ops work on: of this shard its tokens; of all shards every row, since each has its
    /// tokens in front and padding behind them.
    pub(super) const fn of(self, place: Place) -> usize {
        if place.shards == 1 { self.own } else { self.padded * place.shards }
    }
}

/// `[rows, width]` buffers at `offset * rows`, see [`Place`].
#[derive(Debug, Default)]
pub(super) struct Arena {
    memory: Vec<f32>,
}

/// What a failed borrow means: the lowering planned overlapping buffers.
const DISJOINT: &str = "an op's buffers are disjoint";

impl Arena {
    pub(super) fn allocate(&mut self, elements: usize) {
        self.memory = vec![0.0; elements];
    }

    /// What an op works on.
    fn range(place: Place, rows: Rows) -> Range<usize> {
        let start = place.offset * rows.padded;
        start..start + place.width * rows.of(place)
    }

    /// With the padding, as ranks exchange it.
    fn whole(place: Place, rows: Rows) -> Range<usize> {
        let start = place.offset * rows.padded;
        start..start + place.width * place.shards * rows.padded
    }

    pub(super) fn one(&mut self, place: Place, rows: Rows) -> &mut [f32] {
        &mut self.memory[Self::range(place, rows)]
    }

    pub(super) fn two(&mut self, places: [Place; 2], rows: Rows) -> [&mut [f32]; 2] {
        let ranges = places.map(|place| Self::range(place, rows));
        self.memory.get_disjoint_mut(ranges).expect(DISJOINT)
    }

    pub(super) fn three(&mut self, places: [Place; 3], rows: Rows) -> [&mut [f32]; 3] {
        let ranges = places.map(|place| Self::range(place, rows));
        self.memory.get_disjoint_mut(ranges).expect(DISJOINT)
    }

    /// A buffer with its padding, made zero.
    pub(super) fn padded(&mut self, place: Place, rows: Rows) -> &mut [f32] {
        let (used, whole) = (Self::range(place, rows), Self::whole(place, rows));
        self.memory[used.end..whole.end].fill(0.0);
        &mut self.memory[whole]
    }

    /// As [`Arena::padded`], and one that is written with its padding.
    pub(super) fn padded_to(&mut self, x: Place, out: Place, rows: Rows) -> [&mut [f32]; 2] {
        self.padded(x, rows);
        let ranges = [x, out].map(|place| Self::whole(place, rows));
        self.memory.get_disjoint_mut(ranges).expect(DISJOINT)
    }
}
