//! Proof that the simulation can fail: each planted bug, one at a time, in a copy of the sources,
//! must be found. Slow (each one is a build), so it is run on demand:
//! `cargo test -p sim --test planted -- --ignored --nocapture`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

struct Bug {
    name: &'static str,
    file: &'static str,
    from: &'static str,
    to: &'static str,
}

const KV: &str = "control-plane/kv-cache/src/";
const SCHEDULER: &str = "control-plane/scheduler/src/";

macro_rules! bug {
    ($name:literal, $dir:ident / $file:literal, $from:literal => $to:literal) => {
        ($dir, Bug { name: $name, file: $file, from: $from, to: $to })
    };
}

const BUGS: &[(&str, Bug)] = &[
    bug!("blocks are reused while steps in flight use them", KV / "epoch.rs",
        "stamp <= self.through" => "stamp <= self.through || true"),
    bug!("cached blocks are evicted before their epoch retires", KV / "pool.rs",
        "if proof.covers(meta.stamp) {" => "if proof.covers(meta.stamp) || true {"),
    bug!("a shared block is freed with its first release", KV / "pool.rs",
        "meta.refs -= 1;\n        if meta.refs > 0 {" => "meta.refs -= 1;\n        if false {"),
    bug!("a hit does not count its reference", KV / "prefix.rs",
        "meta.refs += 1;" => "meta.refs = 1;"),
    bug!("the window is trimmed a block too early", KV / "prefix.rs",
        "Tokens((position.0 + 1).saturating_sub" => "Tokens((position.0 + 65).saturating_sub"),
    bug!("an evicted block keeps its name", KV / "pool.rs",
        "        g.index.remove(block);\n" => ""),
    bug!("unconfirmed tokens are sealed", SCHEDULER / "outcome.rs",
        "seat.tables.seal(&mut life.cache, computed," => "seat.tables.seal(&mut life.cache, seat.planned,"),
    bug!("a block is named by the tokens of the block before", SCHEDULER / "job.rs",
        "let start = next * BLOCK" => "let start = next.saturating_sub(1) * BLOCK"),
    bug!("blocks are sealed from the wrong end", SCHEDULER / "tables.rs",
        "if let Some(block) = g.writable.pop_front() {\n                    g.shared" =>
        "if let Some(block) = g.writable.pop_back() {\n                    g.shared"),
    bug!("a slot is given again while a step refers to it", SCHEDULER / "slots.rs",
        "if retired.covers(launched) {" => "if retired.covers(launched) || true {"),
    bug!("a slot is reused under the same generation", SCHEDULER / "slots.rs",
        "row.generation = row.generation.next();" => ""),
    bug!("one token too many is generated", SCHEDULER / "job.rs",
        "(generated >= self.max_tokens)" => "(generated > self.max_tokens)"),
    bug!("a preempted request's tokens are not sent again", SCHEDULER / "preempt.rs",
        "self.upload_to(life.incarnation, key);" => ""),
    bug!("a preempted request is forgotten", SCHEDULER / "preempt.rs",
        "self.waiting.insert(rank, key);" => ""),
    bug!("a hit on the whole prompt leaves nothing to compute", SCHEDULER / "admit.rs",
        "Tokens(job.known().0 - 1).blocks_full()" => "job.known().blocks_full()"),
    bug!("prompt log-probabilities skip the cached part", SCHEDULER / "admit.rs",
        " || job.logprobs_due().is_some()" => ""),
    bug!("prompt log-probabilities are told twice", SCHEDULER / "outcome.rs",
        "part.entries.drain(..known);\n        part.first = job.logprobs_from;" => ""),
    bug!("later requests overtake", SCHEDULER / "admit.rs",
        "self.waiting.first_key_value()" => "self.waiting.last_key_value()"),
    bug!("a sacrificed request stays in the plan", SCHEDULER / "preempt.rs",
        "draft.room += draft.chunks.remove(at).tokens;" => "let _ = at;"),
    bug!("requests of a dead worker are lost", SCHEDULER / "worker.rs",
        "self.waiting.insert(job.rank, key);" => ""),
    bug!("a stalled slot stays in the decode set", SCHEDULER / "decode.rs",
        "delta.leave.push(at.slot);" => ""),
    bug!("an aborted request stays in its slot", SCHEDULER / "preempt.rs",
        "life.ops.push(SlotOp::Retire { slot });" => ""),
    bug!("a shortage is remembered after it ended", SCHEDULER / "admit.rs",
        " || life.running.len() < running" => ""),
];

#[test]
#[ignore = "builds the sources once per planted bug, several minutes"]
fn every_planted_bug_is_found() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let copy = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("planted");
    copy_sources(&root, &copy);
    assert!(storm(&copy), "the unchanged sources must pass");
    let mut missed = Vec::new();
    for (dir, bug) in BUGS {
        let path = copy.join(dir).join(bug.file);
        let good = fs::read_to_string(&path).expect("readable");
        assert!(good.contains(bug.from), "{}: {} no longer says so", bug.name, bug.file);
        fs::write(&path, good.replacen(bug.from, bug.to, 1)).expect("writable");
        let passed = storm(&copy);
        fs::write(&path, good).expect("writable");
        eprintln!("{}: {}", if passed { "MISSED" } else { "found" }, bug.name);
        if passed {
            missed.push(bug.name);
        }
    }
    assert!(missed.is_empty(), "not found: {missed:#?}");
}

/// Whether the simulation finds nothing wrong. A build that fails is an error of this test.
fn storm(copy: &Path) -> bool {
    let cargo = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO"));
        command.current_dir(copy).env("CARGO_TARGET_DIR", copy.join("target"));
        command.args(args).output().expect("cargo runs")
    };
    let build = cargo(&["build", "--offline", "-q", "-p", "sim"]);
    assert!(build.status.success(), "{}", String::from_utf8_lossy(&build.stderr));
    let run =
        cargo(&["run", "--offline", "-q", "-p", "sim", "--", "--seeds", "12", "--events", "5000"]);
    run.status.success()
}

fn copy_sources(root: &Path, copy: &Path) {
    let manifest = fs::read_to_string(root.join("Cargo.toml")).expect("a workspace");
    let (before, rest) = manifest.split_once("members = [").expect("members");
    let (_, after) = rest.split_once("default-members").expect("default members");
    let (_, after) = after.split_once('\n').expect("more lines");
    let members = "members = [\"proto/*\", \"control-plane/*\", \"bench/sim\"]\n";
    fs::create_dir_all(copy).expect("writable");
    fs::write(copy.join("Cargo.toml"), format!("{before}{members}{after}")).expect("writable");
    for file in ["Cargo.lock", "rust-toolchain.toml"] {
        fs::copy(root.join(file), copy.join(file)).expect("copies");
    }
    for krate in [
        "proto/ids",
        "proto/step",
        "control-plane/kv-cache",
        "control-plane/scheduler",
        "bench/sim",
    ] {
        copy_tree(&root.join(krate), &copy.join(krate));
    }
}

fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("writable");
    for entry in fs::read_dir(from).expect("readable") {
        let entry = entry.expect("readable");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("known").is_dir() {
            copy_tree(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).expect("copies");
        }
    }
}
