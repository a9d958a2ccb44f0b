//! Every legal move. Generated from the types and the table beside them.
#![allow(dead_code, unused_imports, unused_variables)]

use scheduler::request::*;

fn any<T>() -> T {
    loop {}
}

fn queued_admit(request: Request<Queued>) {
    let _ = request.admit(any());
}

fn queued_finish(request: Request<Queued>) {
    let _ = request.finish(any());
}

fn preempted_admit(request: Request<Preempted>) {
    let _ = request.admit(any());
}

fn preempted_finish(request: Request<Preempted>) {
    let _ = request.finish(any());
}

fn prefilling_close(request: Request<Prefilling>) {
    let _ = request.close(any(), any());
}

fn prefilling_decode(request: Request<Prefilling>) {
    let _ = request.decode(any());
}

fn prefilling_lose(request: Request<Prefilling>) {
    let _ = request.lose(any());
}

fn prefilling_preempt(request: Request<Prefilling>) {
    let _ = request.preempt();
}

fn decoding_close(request: Request<Decoding>) {
    let _ = request.close(any(), any());
}

fn decoding_lose(request: Request<Decoding>) {
    let _ = request.lose(any());
}

fn decoding_preempt(request: Request<Decoding>) {
    let _ = request.preempt();
}

fn closing_finish(request: Request<Closing>) {
    let _ = request.finish(any());
}

fn closing_lose(request: Request<Closing>) {
    let _ = request.lose(any());
}

fn main() {}
