//! Weights as a program declares them: the checkpoint's name, the whole shape, and how it is cut.
//!
//! It holds no data. Invariant: names are those of published checkpoints.

use super::Extent;

/// Index into a program's weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WeightId(pub usize);

/// The whole tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// `[out, input]`, row-major.
    Matrix {
        /// Rows.
        out: Extent,
        /// Columns.
        input: Extent,
    },
    /// `[len]`; used in 32-bit floats.
    Vector(Extent),
}

/// How ranks share a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Every rank holds all of it.
    Whole,
    /// Rows (or elements of a vector) over `tp`; the result is cut along its width.
    Out,
    /// Columns over `tp`; the result is a summand.
    In,
    /// Belongs whole to the rank that owns this expert, of so many, over `ep`.
    Expert {
        /// The expert.
        index: usize,
        /// Experts in all.
        of: usize,
    },
    /// A bias added to summands: one rank of `tp` adds it.
    First,
}

/// A declared weight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weight {
    /// Name in the checkpoint.
    pub name: String,
    /// Whole shape.
    pub shape: Shape,
    /// How it is cut.
    pub cut: Cut,
}
