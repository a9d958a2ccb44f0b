//! No move here is one that `Finished` has. Generated from the types and the table beside them.
#![allow(dead_code, unused_imports, unused_variables)]

use scheduler::request::*;

fn any<T>() -> T {
    loop {}
}

fn finished_admit(request: Request<Finished>) {
    let _ = request.admit(any());
}

fn finished_close(request: Request<Finished>) {
    let _ = request.close(any(), any());
}

fn finished_decode(request: Request<Finished>) {
    let _ = request.decode(any());
}

fn finished_finish(request: Request<Finished>) {
    let _ = request.finish(any());
}

fn finished_lose(request: Request<Finished>) {
    let _ = request.lose(any());
}

fn finished_preempt(request: Request<Finished>) {
    let _ = request.preempt();
}

fn main() {}
