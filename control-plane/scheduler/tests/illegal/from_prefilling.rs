//! No move here is one that `Prefilling` has. Generated from the types and the table beside them.
#![allow(dead_code, unused_imports, unused_variables)]

use scheduler::request::*;

fn any<T>() -> T {
    loop {}
}

fn prefilling_admit(request: Request<Prefilling>) {
    let _ = request.admit(any());
}

fn prefilling_finish(request: Request<Prefilling>) {
    let _ = request.finish(any());
}

fn main() {}
