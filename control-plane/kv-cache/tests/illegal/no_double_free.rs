//! A writable block is given back once.

use kv_cache::{KvCache, WritableBlock};

fn free(cache: &mut KvCache, block: WritableBlock) {
    cache.discard(block);
    cache.discard(block);
}

fn main() {
    let _ = free;
}
