//! The goldens of transformers 5.17 on the CPU.

mod common;

use common::{Setup, goldens};

/// What parity means.
const TOLERANCE: f64 = 2e-3;

#[test]
fn every_case_agrees_with_its_golden() {
    goldens::every_case_agrees(Setup::default(), TOLERANCE);
}
