//! One count of a shared block is given back once.

use kv_cache::{KvCache, SharedBlock};

fn free(cache: &mut KvCache, block: SharedBlock) {
    cache.release(block);
    cache.release(block);
}

fn main() {
    let _ = free;
}
