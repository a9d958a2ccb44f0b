//! No move here is one that `Preempted` has. Generated from the table in tests/moves.rs.
#![allow(dead_code, unused_imports)]

use scheduler::request::{Closing, Decoding, Finished, Preempted, Prefilling, Queued, Request};

fn any<T>() -> T {
    loop {}
}

fn preempted_decode(request: Request<Preempted>) {
    let _ = request.decode(any());
}

fn preempted_preempt(request: Request<Preempted>) {
    let _ = request.preempt();
}

fn preempted_close(request: Request<Preempted>) {
    let _ = request.close(any(), any());
}

fn preempted_lose(request: Request<Preempted>) {
    let _ = request.lose(any());
}

fn main() {}
