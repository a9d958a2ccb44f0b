//! Slot and blocks leave a request only through its moves.

use scheduler::request::{Decoding, Request, Seat};

fn take(request: Request<Decoding>) -> Seat {
    request.state.seat
}

fn main() {
    let _ = take;
}
