//! No move here is one that `Preempted` has. Generated from the types and the table beside them.
#![allow(dead_code, unused_imports, unused_variables)]

use scheduler::request::*;

fn any<T>() -> T {
    loop {}
}

fn preempted_close(request: Request<Preempted>) {
    let _ = request.close(any(), any());
}

fn preempted_decode(request: Request<Preempted>) {
    let _ = request.decode(any());
}

fn preempted_lose(request: Request<Preempted>) {
    let _ = request.lose(any());
}

fn preempted_preempt(request: Request<Preempted>) {
    let _ = request.preempt();
}

fn main() {}
