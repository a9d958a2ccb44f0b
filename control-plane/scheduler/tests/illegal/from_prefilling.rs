//! No move here is one that `Prefilling` has. Generated from the table in tests/moves.rs.
#![allow(dead_code, unused_imports)]

use scheduler::request::{Closing, Decoding, Finished, Preempted, Prefilling, Queued, Request};

fn any<T>() -> T {
    loop {}
}

fn prefilling_admit(request: Request<Prefilling>) {
    let _ = request.admit(any());
}

fn prefilling_finish(request: Request<Prefilling>) {
    let _ = request.finish(any());
}

fn main() {}
