//! A step in which nobody comes or goes takes no memory, however long the contexts and the line.
//!
//! Alone in its program, because it counts every allocation of its thread.

use core::time::Duration;
use ids::Tokens;
use sim::planner_bench::{Case, Kind, measure};

/// Runs and gives the number of allocations as so many microseconds.
fn allocations(run: &mut dyn FnMut()) -> Duration {
    Duration::from_micros(allocation_counter::measure(run).count_total)
}

#[test]
fn a_steady_step_takes_no_memory() {
    for kind in [Kind::Steady, Kind::Line] {
        for (requests, context) in [(16, 1000), (256, 1000), (64, 20_000)] {
            let case = Case { requests, context: Tokens(context), kind, steps: 600 };
            let counted = measure(case, allocations, |_| ()).expect("measures");
            assert_eq!(counted.mean_us, 0.0, "{case:?}: {counted:?}");
        }
    }
}

#[test]
fn the_count_counts() {
    // Who comes is given tables and a row, and is answered.
    let case = Case { requests: 16, context: Tokens(1000), kind: Kind::Churn, steps: 100 };
    let counted = measure(case, allocations, |_| ()).expect("measures");
    assert!(counted.mean_us > 3.0, "{counted:?}");
}
