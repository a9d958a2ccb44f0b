//! No move here is one that `GivenAway` has. Generated from the types and the table beside them.
#![allow(dead_code, unused_imports, unused_variables)]

use kv_cache::*;

fn any<T>() -> T {
    loop {}
}

fn writableblock_seal_write(cache: &mut KvCache, block: WritableBlock) {
    let _ = cache.seal(block, any());
    let _ = block.write_slot();
}

fn writableblock_seal_seal(cache: &mut KvCache, block: WritableBlock) {
    let _ = cache.seal(block, any());
    let _ = cache.seal(block, any());
}

fn writableblock_seal_discard(cache: &mut KvCache, block: WritableBlock) {
    let _ = cache.seal(block, any());
    let _ = cache.discard(block);
}

fn writableblock_seal_void(cache: &mut KvCache, block: WritableBlock) {
    let _ = cache.seal(block, any());
    let _ = block.void(any());
}

fn writableblock_discard_write(cache: &mut KvCache, block: WritableBlock) {
    let _ = cache.discard(block);
    let _ = block.write_slot();
}

fn writableblock_discard_seal(cache: &mut KvCache, block: WritableBlock) {
    let _ = cache.discard(block);
    let _ = cache.seal(block, any());
}

fn writableblock_discard_discard(cache: &mut KvCache, block: WritableBlock) {
    let _ = cache.discard(block);
    let _ = cache.discard(block);
}

fn writableblock_discard_void(cache: &mut KvCache, block: WritableBlock) {
    let _ = cache.discard(block);
    let _ = block.void(any());
}

fn writableblock_void_write(cache: &mut KvCache, block: WritableBlock) {
    let _ = block.void(any());
    let _ = block.write_slot();
}

fn writableblock_void_seal(cache: &mut KvCache, block: WritableBlock) {
    let _ = block.void(any());
    let _ = cache.seal(block, any());
}

fn writableblock_void_discard(cache: &mut KvCache, block: WritableBlock) {
    let _ = block.void(any());
    let _ = cache.discard(block);
}

fn writableblock_void_void(cache: &mut KvCache, block: WritableBlock) {
    let _ = block.void(any());
    let _ = block.void(any());
}

fn sharedblock_release_read(cache: &mut KvCache, block: SharedBlock) {
    let _ = cache.release(block);
    let _ = block.id();
}

fn sharedblock_release_share(cache: &mut KvCache, block: SharedBlock) {
    let _ = cache.release(block);
    let _ = cache.share(&block);
}

fn sharedblock_release_release(cache: &mut KvCache, block: SharedBlock) {
    let _ = cache.release(block);
    let _ = cache.release(block);
}

fn sharedblock_release_void(cache: &mut KvCache, block: SharedBlock) {
    let _ = cache.release(block);
    let _ = block.void(any());
}

fn sharedblock_void_read(cache: &mut KvCache, block: SharedBlock) {
    let _ = block.void(any());
    let _ = block.id();
}

fn sharedblock_void_share(cache: &mut KvCache, block: SharedBlock) {
    let _ = block.void(any());
    let _ = cache.share(&block);
}

fn sharedblock_void_release(cache: &mut KvCache, block: SharedBlock) {
    let _ = block.void(any());
    let _ = cache.release(block);
}

fn sharedblock_void_void(cache: &mut KvCache, block: SharedBlock) {
    let _ = block.void(any());
    let _ = block.void(any());
}

fn main() {}
