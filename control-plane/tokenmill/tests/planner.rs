//! The planner's cost does not grow with context: a steady step at 256 x 60k takes at most 1.3 times
//! one at 256 x 1k.
//!
//! A ratio of medians on one machine in one run, so it holds on slow machines and in unoptimised builds;
//! microseconds are recorded elsewhere. The best of three runs counts, since other work only adds time.

use serde_json::Value;
use std::process::Command;

/// Medians of one run: steady steps at 256 x 1k and 256 x 60k.
fn steady() -> [f64; 2] {
    let output = Command::new(env!("CARGO_BIN_EXE_tokenmill"))
        .args(["bench", "planner", "--json", "--steps", "400"])
        .output()
        .expect("the binary starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let cases: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).expect("one JSON object a line"))
        .collect();
    [1_000, 60_000].map(|context| {
        let case = cases.iter().find(|case| {
            case["kind"] == "steady" && case["requests"] == 256 && case["context_tokens"] == context
        });
        case.and_then(|case| case["p50_us"].as_f64()).expect("the case is measured")
    })
}

#[test]
fn a_steady_step_is_flat_in_context() {
    let ratio = |[short, long]: [f64; 2]| long / short;
    let best = (0..3).map(|_| ratio(steady())).fold(f64::INFINITY, f64::min);
    assert!(best <= 1.3, "256 x 60k takes {best:.2} times 256 x 1k");
}
