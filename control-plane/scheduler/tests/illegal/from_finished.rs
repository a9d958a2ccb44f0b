//! No move here is one that `Finished` has. Generated from the table in tests/moves.rs.
#![allow(dead_code, unused_imports)]

use scheduler::request::{Closing, Decoding, Finished, Preempted, Prefilling, Queued, Request};

fn any<T>() -> T {
    loop {}
}

fn finished_admit(request: Request<Finished>) {
    let _ = request.admit(any());
}

fn finished_decode(request: Request<Finished>) {
    let _ = request.decode(any());
}

fn finished_preempt(request: Request<Finished>) {
    let _ = request.preempt();
}

fn finished_close(request: Request<Finished>) {
    let _ = request.close(any(), any());
}

fn finished_lose(request: Request<Finished>) {
    let _ = request.lose(any());
}

fn finished_finish(request: Request<Finished>) {
    let _ = request.finish(any());
}

fn main() {}
