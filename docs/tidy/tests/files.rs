//! Every source file says what it is, and stays short enough to hold one concept.

mod common;

/// Longest file without a line in [`LONG`].
const MAX_LINES: usize = 600;

/// Files that may be longer, with the reason. Take a line off when its file shrinks.
const LONG: [(&str, &str); 0] = [];

#[test]
fn every_file_opens_with_what_it_is() {
    let silent: Vec<String> = common::rust_sources()
        .into_iter()
        .filter(|(path, text)| {
            // Cases of compile-fail tests are one illegal move each; their name says which.
            !path.contains("/compile_fail/") && !text.trim_start().starts_with("//!")
        })
        .map(|(path, _)| path)
        .collect();
    assert!(silent.is_empty(), "no //! header: {silent:#?}");
}

#[test]
fn no_file_outgrows_one_concept() {
    for (path, text) in common::rust_sources() {
        let lines = text.lines().count();
        let excused = LONG.iter().any(|(name, _)| *name == path);
        assert_eq!(
            lines > MAX_LINES,
            excused,
            "{path} has {lines} lines; over {MAX_LINES} a file is split or listed with a reason"
        );
    }
}

#[test]
fn unsafe_stays_at_its_addresses() {
    const ADDRESSES: [&str; 3] =
        ["kernels/device/", "kernels/ops/", "worker/weights/src/map_file.rs"];
    // In two parts, so that this file does not hold what it looks for.
    const KEYWORD: &str = concat!("un", "safe");
    const MARKS: [&str; 3] = ["{", "impl", "fn"];
    for (path, text) in common::rust_sources() {
        let at_address = ADDRESSES.iter().any(|address| path.starts_with(address));
        let has_unsafe = text.lines().map(str::trim_start).any(|line| {
            !line.starts_with("//")
                && MARKS.iter().any(|mark| line.contains(&format!("{KEYWORD} {mark}")))
        });
        assert!(at_address || !has_unsafe, "{path} holds unsafe code");
    }
}
