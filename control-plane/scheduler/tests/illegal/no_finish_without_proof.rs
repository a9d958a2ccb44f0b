//! A closing request gives up its slot only against proof that its last step retired.

use scheduler::request::{Closing, Request};

fn finish(request: Request<Closing>) {
    let _ = request.finish();
}

fn main() {
    let _ = finish;
}
