//! Counts are made by the cache alone.

use kv_cache::SharedBlock;

fn copy(block: &SharedBlock) -> SharedBlock {
    block.clone()
}

fn main() {
    let _ = copy;
}
