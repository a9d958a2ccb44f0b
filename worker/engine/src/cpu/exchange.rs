//! What this rank exchanges with others: the collectives of a program, over the axes of its mesh.
//!
//! All ranks of an axis move the same padded rows, whatever tokens each has. It adds nothing up itself.
//! Invariant: a group's number is its axis, on every rank.

use super::arena::{Arena, Rows};
use super::launch::Place;
use device::collectives::{CollectiveError, Collectives, ElementsMut, Group, Transfer};
use model::mesh::{Axis, Mesh, Rank};
use model::program::Dim;

/// The other ranks, from this one's end.
pub(super) struct Exchange {
    collectives: Box<dyn Collectives>,
    /// By axis.
    groups: [Group; 3],
}

const AXES: [(Axis, &str); 3] = [(Axis::Dp, "dp"), (Axis::Tp, "tp"), (Axis::Ep, "ep")];

impl Exchange {
    /// The end of a rank of `mesh`.
    pub(super) fn new(collectives: Box<dyn Collectives>, mesh: Mesh, rank: Rank) -> Self {
        let group = |number: usize| {
            let (axis, name) = AXES[number];
            let members = mesh.peers(rank, axis).into_iter().map(|peer| peer.0).collect();
            Group::new(number, name, members, rank.0)
        };
        Self { collectives, groups: [group(0), group(1), group(2)] }
    }

    /// The step that follows, for errors.
    pub(super) fn begin_step(&mut self, step: u64) {
        self.collectives.begin_step(step);
    }

    const fn number(axis: Axis) -> usize {
        match axis {
            Axis::Dp => 0,
            Axis::Tp => 1,
            Axis::Ep => 2,
        }
    }

    /// Sums `x` over an axis, in place. Returns the bytes that came from other ranks.
    pub(super) fn all_reduce(
        &mut self,
        arena: &mut Arena,
        x: Place,
        axis: Axis,
        rows: Rows,
    ) -> Result<u64, CollectiveError> {
        let x = ElementsMut::F32(arena.padded(x, rows));
        self.collectives.all_reduce(&self.groups[Self::number(axis)], x)
    }

    /// Rows of all ranks of an axis behind each other, or their parts of rows side by side.
    pub(super) fn all_gather(
        &mut self,
        arena: &mut Arena,
        [x, out]: [Place; 2],
        (dim, axis): (Dim, Axis),
        rows: Rows,
    ) -> Result<u64, CollectiveError> {
        let width = x.width;
        let [x, out] = arena.padded_to(x, out, rows);
        let run = match dim {
            Dim::Tokens => x.len(),
            Dim::Width => width,
        };
        let group = &self.groups[Self::number(axis)];
        self.collectives.all_gather(group, Transfer::F32 { x, out }, run)
    }

    /// This rank's rows of the sum of `x` over an axis.
    pub(super) fn reduce_scatter(
        &mut self,
        arena: &mut Arena,
        [x, out]: [Place; 2],
        axis: Axis,
        rows: Rows,
    ) -> Result<u64, CollectiveError> {
        let [x, out] = arena.padded_to(x, out, rows);
        let group = &self.groups[Self::number(axis)];
        self.collectives.reduce_scatter(group, Transfer::F32 { x, out })
    }
}
