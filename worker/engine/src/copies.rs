//! A block on its way between the cache and the host's memory behind it.
//!
//! It carries nothing out. Invariant: made by [`crate::tables::Carver`], which checked that both ends
//! lie inside their memories.

/// Which way a block is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the cache to the host.
    Store,
    /// Back.
    Load,
}

/// One contiguous copy: a block of a group is all its layers, in one piece. In elements of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockCopy {
    /// Which way.
    pub way: Way,
    /// Where the block lies in the cache.
    pub cache: usize,
    /// Where it lies in the host's memory.
    pub host: usize,
    /// How much.
    pub len: usize,
}
