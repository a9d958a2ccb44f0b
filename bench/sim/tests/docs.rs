//! What docs/simulation.md says is what was recorded.

use sim::figures::{ENDS, Fault};
use std::fs;
use std::path::Path;

fn read(path: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    fs::read_to_string(root.join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The number that a JSON line gives under a name.
fn figure<'a>(line: &'a str, name: &str) -> &'a str {
    let (_, rest) = line.split_once(&format!("\"{name}\":")).unwrap_or_else(|| panic!("no {name}"));
    rest.split([',', '}']).next().unwrap_or_default()
}

#[test]
fn the_page_has_the_recorded_figures() {
    let (page, recorded) = (read("docs/simulation.md"), read("bench/results/sim.jsonl"));
    let line = recorded.lines().last().expect("a run was recorded");
    assert_eq!(figure(line, "violations"), "0");
    let plain = ["events", "simulated_hours", "runs", "requests", "plans_equal", "worker_deaths"];
    let faults = Fault::ALL.map(|(_, name)| name);
    for name in plain.iter().chain(&faults).chain(&ENDS) {
        let row = format!("| {} | {} |", name.replace('_', " "), figure(line, name));
        assert!(page.contains(&row), "docs/simulation.md lacks {row:?}");
    }
}
