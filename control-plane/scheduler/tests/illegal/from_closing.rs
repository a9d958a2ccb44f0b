//! No move here is one that `Closing` has. Generated from the types and the table beside them.
#![allow(dead_code, unused_imports, unused_variables)]

use scheduler::request::*;

fn any<T>() -> T {
    loop {}
}

fn closing_admit(request: Request<Closing>) {
    let _ = request.admit(any());
}

fn closing_close(request: Request<Closing>) {
    let _ = request.close(any(), any());
}

fn closing_decode(request: Request<Closing>) {
    let _ = request.decode(any());
}

fn closing_preempt(request: Request<Closing>) {
    let _ = request.preempt();
}

fn main() {}
