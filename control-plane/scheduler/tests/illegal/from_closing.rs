//! No move here is one that `Closing` has. Generated from the table in tests/moves.rs.
#![allow(dead_code, unused_imports)]

use scheduler::request::{Closing, Decoding, Finished, Preempted, Prefilling, Queued, Request};

fn any<T>() -> T {
    loop {}
}

fn closing_admit(request: Request<Closing>) {
    let _ = request.admit(any());
}

fn closing_decode(request: Request<Closing>) {
    let _ = request.decode(any());
}

fn closing_preempt(request: Request<Closing>) {
    let _ = request.preempt();
}

fn closing_close(request: Request<Closing>) {
    let _ = request.close(any(), any());
}

fn main() {}
