//! Limbo is emptied only with a proof.

use kv_cache::KvCache;

fn reclaim(cache: &mut KvCache) {
    cache.reclaim();
}

fn main() {
    let _ = reclaim;
}
