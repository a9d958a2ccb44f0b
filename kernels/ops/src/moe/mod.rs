//! Mixture of experts: the choice of experts from router logits, and their weighted sum.

pub mod cuda;

mod experts;
mod route;
#[cfg(test)]
mod tests;

pub use experts::{ExpertWeights, Scratch, experts};
pub use route::{GroupLimit, GroupScore, MAX_EXPERTS, Router, Scoring, route};

/// The experts of each token: `[tokens, top_k]` twice.
#[derive(Clone, Copy, Debug)]
pub struct Routing<'a> {
    /// Number of the expert.
    pub experts: &'a [u32],
    /// Its weight.
    pub weights: &'a [f32],
    /// Experts per token.
    pub top_k: usize,
}
