//! Where a value lives: one placement per mesh axis, so "cut over the ranks of a shard" and "cut
//! over all ranks" can never be confused.
//!
//! It inserts nothing. Invariant: `ep` is no third state; it names both axes at once.

use crate::mesh::Axis;
use core::fmt;

/// The dimension that is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dim {
    /// Rows: one per token.
    Tokens,
    /// Columns: heads, channels, vocabulary.
    Width,
}

/// A value along one axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Every rank holds all of it.
    Replicate,
    /// Every rank holds its part of a dimension.
    Shard(Dim),
    /// Every rank holds a summand.
    Partial,
}

/// A value along both axes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Across data-parallel shards.
    pub dp: Place,
    /// Inside a shard.
    pub tp: Place,
}

impl Placement {
    /// The state between modules: each shard has its own tokens, whole on each of its ranks.
    pub const BOUNDARY: Self = Self { dp: Place::Shard(Dim::Tokens), tp: Place::Replicate };

    /// This placement with `place` along `axis`.
    #[must_use]
    pub const fn with(self, axis: Axis, place: Place) -> Self {
        match axis {
            Axis::Dp => Self { dp: place, ..self },
            Axis::Tp => Self { tp: place, ..self },
            Axis::Ep => Self { dp: place, tp: place },
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Replicate => "R",
            Self::Shard(Dim::Tokens) => "S(tokens)",
            Self::Shard(Dim::Width) => "S(width)",
            Self::Partial => "P",
        })
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dp:{} tp:{}", self.dp, self.tp)
    }
}
