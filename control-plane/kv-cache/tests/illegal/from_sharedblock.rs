//! No move here is one that `SharedBlock` has. Generated from the types and the table beside them.
#![allow(dead_code, unused_imports, unused_variables)]

use kv_cache::*;

fn any<T>() -> T {
    loop {}
}

fn sharedblock_write(cache: &mut KvCache, block: SharedBlock) {
    let _ = block.write_slot();
}

fn sharedblock_seal(cache: &mut KvCache, block: SharedBlock) {
    let _ = cache.seal(block, any());
}

fn sharedblock_discard(cache: &mut KvCache, block: SharedBlock) {
    let _ = cache.discard(block);
}

fn main() {}
