//! Tests that hold the code to its documentation. The library is empty on purpose: everything is
//! in `tests/`, one file per promise, run by plain `cargo test`.
