//! A proof is used once.

use kv_cache::{KvCache, Retired};

fn reclaim(cache: &mut KvCache, retired: Retired) {
    cache.reclaim(retired);
    cache.reclaim(retired);
}

fn main() {
    let _ = reclaim;
}
