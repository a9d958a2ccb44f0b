//! Newtypes that every crate shares: ids, counts with units, time, and the block hash.
//!
//! Nothing here does anything but hold a value and check it. A count is never an index and an
//! index never a count: the only ways from one to the other are named functions.
//! Invariant: a value that leaves a constructor of this crate is in range.

mod count;
mod hash;
mod id;
mod time;

pub use count::{Blocks, Bytes, Tokens};
pub use hash::{BlockHash, HashKey};
pub use id::{
    BlockId, GroupId, Incarnation, Rank, RequestId, ShardId, SlotGeneration, SlotId, StepSeq,
    TenantId, TierSlot, TokenId,
};
pub use time::Timestamp;

/// Tokens in one KV block, in every cache group.
pub const BLOCK_TOKENS: u32 = 64;
