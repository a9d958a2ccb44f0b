//! No move here is one that `Queued` has. Generated from the table in tests/moves.rs.
#![allow(dead_code, unused_imports)]

use scheduler::request::{Closing, Decoding, Finished, Preempted, Prefilling, Queued, Request};

fn any<T>() -> T {
    loop {}
}

fn queued_decode(request: Request<Queued>) {
    let _ = request.decode(any());
}

fn queued_preempt(request: Request<Queued>) {
    let _ = request.preempt();
}

fn queued_close(request: Request<Queued>) {
    let _ = request.close(any(), any());
}

fn queued_lose(request: Request<Queued>) {
    let _ = request.lose(any());
}

fn main() {}
