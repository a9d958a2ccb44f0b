//! What stands around a step on a device: token ids that only the device knows yet, and changes of
//! block tables.
//!
//! On the processor there is nothing to do, because a step ends before the next is prepared; so there
//! is no other variant than the device's. Invariant: what a step reads was written by steps and
//! changes that were enqueued before it.

pub mod cuda;

/// In an id: the rest is a slot, and the id is the token that was last drawn for it. No vocabulary
/// has as many tokens.
pub const OF_SLOT: u32 = 1 << 31;
/// Instead of a slot: the token is not kept.
pub const NOT_KEPT: u32 = u32::MAX;
