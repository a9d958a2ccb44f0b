//! The right to write is unique.

use kv_cache::WritableBlock;

fn copy(block: &WritableBlock) -> WritableBlock {
    block.clone()
}

fn main() {
    let _ = copy;
}
