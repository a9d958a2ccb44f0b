//! A matrix of (state, move) as compile-fail cases: one file of legal cells that compiles, one of illegal
//! cells per state of which each cell is an error of its own.
//!
//! Shared by the crates whose types are state machines. Invariant: a cell that is in neither kind of file,
//! or whose error went away, fails.

#![allow(clippy::expect_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

/// A cell: what tries the move, and whether it may.
pub(crate) struct Cell {
    pub(crate) state: &'static str,
    /// A function of its own that makes the move.
    pub(crate) function: String,
    pub(crate) legal: bool,
}

/// Files of cases under `tests/illegal`, in the crate at `root`.
pub(crate) struct Matrix {
    pub(crate) root: &'static str,
    /// What every file has before its functions.
    pub(crate) opening: &'static str,
    pub(crate) cells: Vec<Cell>,
}

impl Matrix {
    fn folder(&self) -> PathBuf {
        Path::new(self.root).join("tests/illegal")
    }

    /// Compares the files with the cells (writes them with `TRYBUILD=overwrite`) and compiles them.
    pub(crate) fn hold(&self) {
        self.keep("legal.rs", "Every legal move.", |cell| cell.legal);
        let mut states: Vec<&str> = self.cells.iter().map(|cell| cell.state).collect();
        states.dedup();
        for state in &states {
            let about = format!("No move here is one that `{state}` has.");
            self.keep(&of(state, "rs"), &about, |cell| cell.state == *state && !cell.legal);
        }
        let cases = trybuild::TestCases::new();
        cases.pass("tests/illegal/legal.rs");
        cases.compile_fail("tests/illegal/from_*.rs");
        cases.compile_fail("tests/illegal/no_*.rs");
        // Runs the cases.
        drop(cases);
        for state in states {
            let illegal =
                self.cells.iter().filter(|cell| cell.state == state && !cell.legal).count();
            let words = fs::read_to_string(self.folder().join(of(state, "stderr")));
            let words = words.unwrap_or_default();
            let errors = words.lines().filter(|line| line.starts_with("error[")).count();
            assert_eq!(errors, illegal, "{state}: each illegal move is an error of its own");
        }
    }

    /// Checks that a file says what the cells do.
    fn keep(&self, file: &str, about: &str, wanted: impl Fn(&Cell) -> bool) {
        let functions: String = self
            .cells
            .iter()
            .filter(|cell| wanted(cell))
            .map(|cell| format!("\n{}", cell.function))
            .collect();
        let text = format!(
            "//! {about} Generated from the types and the table beside them.\n#![allow(dead_code, \
             unused_imports, unused_variables)]\n\n{}{functions}\nfn main() {{}}\n",
            self.opening
        );
        let path = self.folder().join(file);
        if std::env::var("TRYBUILD").is_ok_and(|mode| mode == "overwrite") {
            fs::write(&path, &text).expect("writable");
        }
        let kept = fs::read_to_string(&path).unwrap_or_default();
        assert!(kept == text, "{file} is not what the table says; run with TRYBUILD=overwrite");
    }
}

fn of(state: &str, kind: &str) -> String {
    format!("from_{}.{kind}", state.to_lowercase())
}
