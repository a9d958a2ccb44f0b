//! Random weights made where they are used.
//!
//! Element `i` of a tensor is a function of the tensor's key and `i`: two words of splitmix64 over
//! a Weyl sequence that starts at the key, the sum of their eight 16-bit lanes, centred, scaled to
//! unit variance, stretched and shifted. Integers until the last three operations, which are IEEE
//! doubles rounded to nearest, so every machine that keeps to that makes the same bits. Weights on
//! the processor and in files are made by the crate `weights` by the same rule; keys come from
//! there. Only the device's half is here.

pub mod cuda;

/// What a tensor's values are drawn by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Normal {
    /// Start of the tensor's sequence.
    pub key: u64,
    /// Mean.
    pub mean: f64,
    /// Standard deviation.
    pub std: f64,
    /// What values are rounded to before anything else.
    pub stored: Stored,
}

/// The type that a tensor has where it is stored, which may be narrower than where it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// IEEE single precision.
    F32,
    /// The upper half of a single.
    Bf16,
    /// IEEE half precision.
    F16,
}
