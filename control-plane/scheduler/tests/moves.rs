//! Every pair of state and move: what is legal compiles, what is not does not.
//!
//! The cases are generated from the table below and kept beside the compiler's words about them;
//! a state or move added to the table without its files fails here. `TRYBUILD=overwrite` writes
//! both anew. Moves that are checked at run time instead are those of clients (abort, stop,
//! expire, forced preemption): their matrix is one `match` without a wildcard.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

const STATES: [&str; 6] = ["Queued", "Preempted", "Prefilling", "Decoding", "Closing", "Finished"];

/// A move and how it is written.
const MOVES: [(&str, &str); 6] = [
    ("admit", "admit(any())"),
    ("decode", "decode(any())"),
    ("preempt", "preempt()"),
    ("close", "close(any(), any())"),
    ("lose", "lose(any())"),
    ("finish", "finish(any())"),
];

const LEGAL: [(&str, &str); 13] = [
    ("Queued", "admit"),
    ("Queued", "finish"),
    ("Preempted", "admit"),
    ("Preempted", "finish"),
    ("Prefilling", "decode"),
    ("Prefilling", "preempt"),
    ("Prefilling", "close"),
    ("Prefilling", "lose"),
    ("Decoding", "preempt"),
    ("Decoding", "close"),
    ("Decoding", "lose"),
    ("Closing", "lose"),
    ("Closing", "finish"),
];

#[test]
fn only_legal_moves_compile() {
    for (state, made) in LEGAL {
        assert!(STATES.contains(&state) && MOVES.iter().any(|(name, _)| *name == made));
    }
    let legal = |state: &str, made: &str| LEGAL.contains(&(state, made));
    keep("legal.rs", "Every legal move.", &cases(legal));
    for state in STATES {
        let file = format!("from_{}.rs", state.to_lowercase());
        let about = format!("No move here is one that `{state}` has.");
        keep(&file, &about, &cases(|of, made| of == state && !legal(of, made)));
    }
    let compiled = trybuild::TestCases::new();
    compiled.pass("tests/illegal/legal.rs");
    compiled.compile_fail("tests/illegal/from_*.rs");
    compiled.compile_fail("tests/illegal/no_*.rs");
}

fn cases(wanted: impl Fn(&str, &str) -> bool) -> String {
    let mut text = String::new();
    for state in STATES {
        for (made, call) in MOVES {
            if wanted(state, made) {
                let name = format!("{}_{made}", state.to_lowercase());
                let _ = write!(
                    text,
                    "\nfn {name}(request: Request<{state}>) {{\n    let _ = request.{call};\n}}\n"
                );
            }
        }
    }
    text
}

/// Checks that the file says what the table does; writes it when asked to.
fn keep(file: &str, about: &str, cases: &str) {
    let text = format!(
        "//! {about} Generated from the table in tests/moves.rs.\n#![allow(dead_code, \
         unused_imports)]\n\nuse scheduler::request::{{Closing, Decoding, Finished, Preempted, \
         Prefilling, Queued, Request}};\n\nfn any<T>() -> T {{\n    loop {{}}\n}}\n{cases}\nfn \
         main() {{}}\n"
    );
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/illegal").join(file);
    if std::env::var("TRYBUILD").is_ok_and(|mode| mode == "overwrite") {
        fs::write(&path, &text).expect("writable");
    }
    let kept = fs::read_to_string(&path).unwrap_or_default();
    assert!(kept == text, "{file} is not what the table says; run with TRYBUILD=overwrite");
}
