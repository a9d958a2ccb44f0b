//! Handles are dropped only with proof that their cache is gone.

use kv_cache::{Buried, WritableBlock};

fn void(block: WritableBlock) {
    block.void(&Buried(()));
}

fn main() {
    let _ = void;
}
