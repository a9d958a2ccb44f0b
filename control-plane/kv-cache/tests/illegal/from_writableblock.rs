//! No move here is one that `WritableBlock` has. Generated from the types and the table beside them.
#![allow(dead_code, unused_imports, unused_variables)]

use kv_cache::*;

fn any<T>() -> T {
    loop {}
}

fn writableblock_read(cache: &mut KvCache, block: WritableBlock) {
    let _ = block.id();
}

fn writableblock_share(cache: &mut KvCache, block: WritableBlock) {
    let _ = cache.share(&block);
}

fn writableblock_release(cache: &mut KvCache, block: WritableBlock) {
    let _ = cache.release(block);
}

fn main() {}
