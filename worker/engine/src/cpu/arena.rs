//! The activations' memory: one allocation, cut by offsets that the lowering planned.
//!
//! Invariant: an op's buffers are disjoint, which is checked on every borrow, not trusted.

use super::launch::Place;
use core::ops::Range;

/// `[tokens, width]` buffers at `offset * tokens`.
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

    fn range(place: Place, rows: usize) -> Range<usize> {
        place.offset * rows..(place.offset + place.width) * rows
    }

    pub(super) fn one(&mut self, place: Place, rows: usize) -> &mut [f32] {
        &mut self.memory[Self::range(place, rows)]
    }

    pub(super) fn two(&mut self, places: [Place; 2], rows: usize) -> [&mut [f32]; 2] {
        let ranges = places.map(|place| Self::range(place, rows));
        self.memory.get_disjoint_mut(ranges).expect(DISJOINT)
    }

    pub(super) fn three(&mut self, places: [Place; 3], rows: usize) -> [&mut [f32]; 3] {
        let ranges = places.map(|place| Self::range(place, rows));
        self.memory.get_disjoint_mut(ranges).expect(DISJOINT)
    }
}
