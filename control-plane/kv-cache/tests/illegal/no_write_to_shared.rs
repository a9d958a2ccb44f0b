//! A shared block gives no right to write.

use kv_cache::SharedBlock;

fn write(block: &SharedBlock) {
    let _ = block.write_slot();
}

fn main() {
    let _ = write;
}
