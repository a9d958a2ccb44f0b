//! Every operation a model program can contain: contract, f64 reference, a fast path for the CPU, and
//! in each op's module `cuda` its launches on a device (see [`cuda`]).
//!
//! On the CPU activations are f32, row-major `[tokens, width]`; weights are used in the type they are stored
//! in; sums are f32 (f64 in references). An op knows no model and no request. Invariants: no op
//! call allocates, and a token's result does not depend on which thread computes it.

pub mod act;
pub mod cuda;
pub mod embed;
mod exp;
pub mod fill;
pub mod flash;
pub mod gqa;
pub mod linear;
pub mod matrix;
pub mod mla;
pub mod moe;
pub mod norm;
pub mod paged;
pub mod read;
pub mod rope;
pub mod sample;
mod share;
mod simd;
#[cfg(test)]
mod testing;
mod tile;
pub mod tokens;

pub use matrix::{Matrix, WeightSlice};
