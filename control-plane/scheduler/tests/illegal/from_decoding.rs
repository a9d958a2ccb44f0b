//! No move here is one that `Decoding` has. Generated from the table in tests/moves.rs.
#![allow(dead_code, unused_imports)]

use scheduler::request::{Closing, Decoding, Finished, Preempted, Prefilling, Queued, Request};

fn any<T>() -> T {
    loop {}
}

fn decoding_admit(request: Request<Decoding>) {
    let _ = request.admit(any());
}

fn decoding_decode(request: Request<Decoding>) {
    let _ = request.decode(any());
}

fn decoding_finish(request: Request<Decoding>) {
    let _ = request.finish(any());
}

fn main() {}
