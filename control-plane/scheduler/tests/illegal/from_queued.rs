//! No move here is one that `Queued` has. Generated from the types and the table beside them.
#![allow(dead_code, unused_imports, unused_variables)]

use scheduler::request::*;

fn any<T>() -> T {
    loop {}
}

fn queued_close(request: Request<Queued>) {
    let _ = request.close(any(), any());
}

fn queued_decode(request: Request<Queued>) {
    let _ = request.decode(any());
}

fn queued_lose(request: Request<Queued>) {
    let _ = request.lose(any());
}

fn queued_preempt(request: Request<Queued>) {
    let _ = request.preempt();
}

fn main() {}
