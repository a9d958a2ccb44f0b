//! No move here is one that `Decoding` has. Generated from the types and the table beside them.
#![allow(dead_code, unused_imports, unused_variables)]

use scheduler::request::*;

fn any<T>() -> T {
    loop {}
}

fn decoding_admit(request: Request<Decoding>) {
    let _ = request.admit(any());
}

fn decoding_decode(request: Request<Decoding>) {
    let _ = request.decode(any());
}

fn decoding_finish(request: Request<Decoding>) {
    let _ = request.finish(any());
}

fn main() {}
