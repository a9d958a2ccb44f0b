//! A block is shared only after it was sealed.

use kv_cache::{KvCache, WritableBlock};

fn share(cache: &mut KvCache, block: &WritableBlock) {
    let _ = cache.share(block);
}

fn main() {
    let _ = share;
}
