//! Softmax attention over pieces of a sequence's keys, the core that every form of attention shares.
//!
//! A row's keys are taken in order, 64 at a time, with a running maximum (Milakov and Gimelshein,
//! 2018; Dao et al., 2022), in splits of [`SPLIT`] keys at fixed positions that are computed apart
//! and merged in order. Splits let one long sequence use all threads. Invariant: where the splits
//! lie and how they merge depends on positions alone, so a row's bits are the same for every number
//! of threads, in every batch, and whether it is computed alone or in a chunk.

pub mod cuda;

mod pieces;
mod state;
#[cfg(test)]
mod tests;
mod waves;

pub(crate) use pieces::{Piece, Work, visible};
pub(crate) use state::{Queries, State};
pub(crate) use waves::{Slots, run};

/// Keys of a split; a multiple of a block. Merging costs one part in this many.
pub(crate) const SPLIT: usize = 512;
