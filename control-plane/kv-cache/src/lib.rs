//! Who owns which KV block. The type of a handle says what may be done with the memory:
//!
//! - [`WritableBlock`]: one owner, may be written; the only source of a [`step::WriteSlot`].
//! - [`SharedBlock`]: counted, read-only; made by [`KvCache::seal`] or a prefix hit.
//!
//! A launched step names an *epoch*, it holds no blocks. What is released while steps are in
//! flight waits in limbo (or, when the prefix index keeps it, on a waiting list) until the epoch
//! retires, and only [`Retired`], which one module can make, lets a block be handed out again.
//!
//! Where the host's memory holds blocks behind the cache, an evicted one goes there and a hit brings it
//! back: [`KvCache::take_copies`] lists the copies, to be carried out in that order before anything else.
//!
//! No requests, no policy, no clock, no I/O here. Invariant, at all times and in every group:
//! free + owned + shared + cached + limbo = blocks of the super-blocks bound to the group.

mod block;
mod carve;
mod check;
mod epoch;
mod index;
mod list;
mod pool;
mod prefix;
mod supers;
mod tier;

pub use block::{Buried, SharedBlock, WritableBlock};
pub use carve::{CarveError, carve, host_blocks};
pub use check::Imbalance;
pub use epoch::{EpochError, Retired};
pub use pool::{Counts, KvCache, Shortage};
pub use prefix::{Hit, Prefix, first_live};
