//! A block is sealed once.

use ids::BlockHash;
use kv_cache::{KvCache, WritableBlock};

fn seal(cache: &mut KvCache, block: WritableBlock) {
    let one = cache.seal(block, BlockHash(1));
    let two = cache.seal(block, BlockHash(2));
    cache.release(one);
    cache.release(two);
}

fn main() {
    let _ = seal;
}
