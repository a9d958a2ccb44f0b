//! A request is not copied, and neither is its slot.

use scheduler::SlotLease;
use scheduler::request::{Decoding, Request};

fn two(request: &Request<Decoding>, slot: &SlotLease) -> (Request<Decoding>, SlotLease) {
    (request.clone(), slot.clone())
}

fn main() {
    let _ = two;
}
