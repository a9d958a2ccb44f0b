//! Every legal move. Generated from the types and the table beside them.
#![allow(dead_code, unused_imports, unused_variables)]

use kv_cache::*;

fn any<T>() -> T {
    loop {}
}

fn writableblock_write(cache: &mut KvCache, block: WritableBlock) {
    let _ = block.write_slot();
}

fn writableblock_seal(cache: &mut KvCache, block: WritableBlock) {
    let _ = cache.seal(block, any());
}

fn writableblock_discard(cache: &mut KvCache, block: WritableBlock) {
    let _ = cache.discard(block);
}

fn writableblock_void(cache: &mut KvCache, block: WritableBlock) {
    let _ = block.void(any());
}

fn sharedblock_read(cache: &mut KvCache, block: SharedBlock) {
    let _ = block.id();
}

fn sharedblock_share(cache: &mut KvCache, block: SharedBlock) {
    let _ = cache.share(&block);
}

fn sharedblock_release(cache: &mut KvCache, block: SharedBlock) {
    let _ = cache.release(block);
}

fn sharedblock_void(cache: &mut KvCache, block: SharedBlock) {
    let _ = block.void(any());
}

fn main() {}
