//! The OpenAI SDKs for Python and Node complete a scripted session against the bundled model.
//!
//! Where an SDK is not installed the test says so and passes; where `TOKENMILL_REQUIRE` names its
//! language it fails instead, so that the gate cannot skip it.

mod common;

use common::Server;
use std::path::{Path, PathBuf};
use std::process::Command;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sdk")
}

/// Skips loudly, or fails where the environment asks for this language.
fn skip(language: &str, why: &str) {
    let required = std::env::var("TOKENMILL_REQUIRE").unwrap_or_default();
    assert!(!required.split(',').any(|name| name == language), "{language} is required: {why}");
    eprintln!("SKIPPED: {language} session: {why}");
}

fn session(command: &mut Command) {
    let server = Server::start(&[]);
    let done = command.arg(&server.url).output().expect("the interpreter starts");
    assert!(
        done.status.success(),
        "{}\n{}",
        String::from_utf8_lossy(&done.stdout),
        String::from_utf8_lossy(&done.stderr)
    );
}

#[test]
fn the_python_sdk_completes_a_session() {
    let venv = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.venv/bin/python");
    let python = if venv.exists() { venv } else { PathBuf::from("python3") };
    let found = Command::new(&python).args(["-c", "import openai"]).output();
    if !found.is_ok_and(|found| found.status.success()) {
        return skip("python", "the package openai is not installed (tests/sdk/requirements.txt)");
    }
    session(Command::new(python).arg(folder().join("session.py")));
}

#[test]
fn the_node_sdk_completes_a_session() {
    if !folder().join("node_modules/openai").is_dir() {
        return skip("node", "run `npm install` in tests/sdk");
    }
    session(Command::new("node").arg(folder().join("session.mjs")));
}
