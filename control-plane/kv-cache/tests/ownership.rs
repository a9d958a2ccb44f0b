//! What the types of handles forbid does not compile.
//!
//! The matrix of (what one holds, what one tries with it) is generated below, and kept beside the
//! compiler's words about each cell; `TRYBUILD=overwrite` writes both anew. Cases by hand cover what is no
//! move of a block: copies, forged handles, proofs used twice.

mod matrix;

use matrix::{Cell, Matrix};

/// What one may hold of a block.
const HANDLES: [&str; 2] = ["WritableBlock", "SharedBlock"];

/// What may be tried: its name, how it is written, who may, and whether that gives the handle away.
const ACTS: [(&str, &str, &[&str], bool); 7] = [
    ("write", "block.write_slot()", &["WritableBlock"], false),
    ("seal", "cache.seal(block, any())", &["WritableBlock"], true),
    ("discard", "cache.discard(block)", &["WritableBlock"], true),
    ("read", "block.id()", &["SharedBlock"], false),
    ("share", "cache.share(&block)", &["SharedBlock"], false),
    ("release", "cache.release(block)", &["SharedBlock"], true),
    ("void", "block.void(any())", &HANDLES, true),
];

const OPENING: &str = "use kv_cache::*;\n\nfn any<T>() -> T {\n    loop {}\n}\n";

fn function(name: &str, handle: &str, acts: &[&str]) -> String {
    let acts: String = acts.iter().map(|act| format!("    let _ = {act};\n")).collect();
    format!("fn {name}(cache: &mut KvCache, block: {handle}) {{\n{acts}}}\n")
}

/// Each act on each handle.
fn held() -> Vec<Cell> {
    let mut cells = Vec::new();
    for state in HANDLES {
        for (act, call, who, _) in ACTS {
            let name = format!("{}_{act}", state.to_lowercase());
            let legal = who.contains(&state);
            cells.push(Cell { state, function: function(&name, state, &[call]), legal });
        }
    }
    cells
}

/// Each act on a handle after an act that gave it away.
fn given_away() -> Vec<Cell> {
    let mut cells = Vec::new();
    for handle in HANDLES {
        let may = |(_, _, who, _): &&(&str, &str, &[&str], bool)| who.contains(&handle);
        for (before, first, _, _) in ACTS.iter().filter(may).filter(|act| act.3) {
            for (act, call, _, _) in ACTS.iter().filter(may) {
                let name = format!("{}_{before}_{act}", handle.to_lowercase());
                let function = function(&name, handle, &[first, call]);
                cells.push(Cell { state: "GivenAway", function, legal: false });
            }
        }
    }
    cells
}

#[test]
fn forbidden_acts_do_not_compile() {
    let cells = held().into_iter().chain(given_away()).collect();
    Matrix { root: env!("CARGO_MANIFEST_DIR"), opening: OPENING, cells }.hold();
    trybuild::TestCases::new().pass("tests/illegal/legal_life.rs");
}
