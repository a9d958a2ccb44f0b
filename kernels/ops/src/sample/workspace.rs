//! Memory of a draw.

use super::filter::Candidate;

/// Memory for selections, kept between rows, so that a draw takes none.
#[derive(Debug, Default)]
pub struct Workspace {
    /// The highest logit of every chunk.
    pub(super) tops: Vec<f32>,
    /// Weights of what is kept.
    pub(super) weights: Vec<f32>,
    /// Tokens of what is kept; empty where all are.
    pub(super) tokens: Vec<u32>,
    /// Candidates while a cut is sought.
    pub(super) ranked: Vec<Candidate>,
    /// The mass of every chunk of weights.
    pub(super) sums: Vec<f64>,
}

impl Workspace {
    /// For rows of up to `vocab` logits; longer rows make it grow.
    #[must_use]
    pub fn new(vocab: usize) -> Self {
        let chunks = vocab.div_ceil(super::choose::CHUNK);
        Self {
            tops: Vec::with_capacity(chunks),
            weights: Vec::with_capacity(vocab),
            tokens: Vec::with_capacity(vocab),
            ranked: Vec::with_capacity(vocab),
            sums: Vec::with_capacity(chunks),
        }
    }
}
