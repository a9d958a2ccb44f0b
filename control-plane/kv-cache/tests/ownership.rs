//! What the types of handles forbid does not compile. Each case is one forbidden act and the
//! compiler's words about it; the one case that must compile shows that the others fail for their
//! own reason.

#[test]
fn forbidden_acts_do_not_compile() {
    let cases = trybuild::TestCases::new();
    cases.pass("tests/illegal/legal_life.rs");
    cases.compile_fail("tests/illegal/no_*.rs");
}
