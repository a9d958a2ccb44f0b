//! The whole legal life of a block.

use ids::{BlockHash, GroupId};
use kv_cache::{KvCache, Retired};

fn life(cache: &mut KvCache) {
    if let Ok(block) = cache.mint(GroupId(0)) {
        let _right = block.write_slot();
        let shared = cache.seal(block, BlockHash(1));
        let again = cache.share(&shared);
        cache.release(shared);
        cache.release(again);
    }
    let step = cache.launch();
    if let Ok(retired) = cache.retire(step) {
        let _: &Retired = &retired;
        cache.reclaim(retired);
    }
}

fn main() {
    let _ = life;
}
