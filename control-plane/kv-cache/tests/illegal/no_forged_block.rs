//! A writable block comes from the cache.

use ids::{BlockId, GroupId};
use kv_cache::WritableBlock;

fn main() {
    let _ = WritableBlock { group: GroupId(0), block: BlockId(0) };
}
