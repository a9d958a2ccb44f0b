//! The tokenmill binary.
fn main() {}
