//! A buried cache gives out nothing.

use ids::GroupId;
use kv_cache::KvCache;

fn mint(mut cache: KvCache) {
    let _buried = cache.bury();
    let _ = cache.mint(GroupId(0));
}

fn main() {
    let _ = mint;
}
