//! A move takes the request: it cannot be decoding and preempted.

use scheduler::request::{Prefilling, Request};

fn both(request: Request<Prefilling>) {
    let _decoding = request.decode(0);
    let _preempted = request.preempt();
}

fn main() {
    let _ = both;
}
