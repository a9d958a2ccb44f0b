//! Cache groups as a model declares them: layers whose KV lives and dies together.
//!
//! It addresses nothing; blocks are laid out by the lowering and carved by the scheduler.

use super::Extent;

/// What of the past a group keeps, and in which form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheKind {
    /// Keys then values of every earlier token.
    Full,
    /// Latent then rotated key of every earlier token (MLA); the same on every rank of a shard.
    Latent,
    /// Keys then values of the last `window` tokens, the newest included.
    Sliding {
        /// Tokens seen.
        window: usize,
    },
}

/// A declared group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheGroup {
    /// What it keeps.
    pub kind: CacheKind,
    /// One row per token and layer, made of these parts, cut over `tp` unless the kind is latent.
    pub rows: Vec<Vec<Extent>>,
}

/// A layer's place in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheSlot {
    /// Index of the group.
    pub group: usize,
    /// Index of the row within the group.
    pub row: usize,
}
