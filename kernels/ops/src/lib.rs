//! Every operation a model program can contain, for the CPU: contract, f64 reference, fast path.
//!
//! Activations are f32, row-major `[tokens, width]`; weights are used in the type they are stored
//! in; sums are f32 (f64 in references). An op knows no model and no request. Invariants: no op
//! call allocates, and a token's result does not depend on which thread computes it.

pub mod act;
pub mod embed;
mod exp;
mod flash;
pub mod gqa;
pub mod linear;
pub mod matrix;
pub mod mla;
pub mod moe;
pub mod norm;
pub mod paged;
pub mod rope;
pub mod sample;
mod share;
mod simd;
#[cfg(test)]
mod testing;
mod tile;

pub use matrix::{Matrix, WeightSlice};
