//! A minted block may not be left lying.
#![deny(unused_must_use)]

use kv_cache::WritableBlock;

fn mint() -> WritableBlock {
    loop {}
}

fn main() {
    mint();
}
