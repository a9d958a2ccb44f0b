//! Sealing takes the writable block away.

use ids::BlockHash;
use kv_cache::{KvCache, WritableBlock};

fn write(cache: &mut KvCache, block: WritableBlock) {
    let shared = cache.seal(block, BlockHash(1));
    let _ = block.write_slot();
    cache.release(shared);
}

fn main() {
    let _ = write;
}
