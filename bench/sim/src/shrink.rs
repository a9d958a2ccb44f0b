//! From a run that goes wrong to the few acts of it that matter.
//!
//! Acts are left out in ever smaller pieces as long as something still goes wrong; what goes wrong
//! may change on the way. Invariant: the acts returned, run alone, go wrong as said.

use crate::act::Act;
use crate::scenario::Scenario;
use crate::world::World;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// A small run that goes wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shrunk {
    /// The acts that are left, as `--only` takes them.
    pub acts: Vec<Act>,
    /// What goes wrong.
    pub what: String,
    /// Runs that it took.
    pub runs: u32,
}

/// Runs a world, or what is left of it. Returns the acts that took place and, where something was
/// wrong, what; a panic is wrong too.
pub fn attempt(scenario: &Scenario, only: Option<&[Act]>) -> (Vec<Act>, Option<String>) {
    let world = match World::new(scenario.clone()) {
        Ok(world) => world,
        Err(error) => return (Vec::new(), Some(error.to_string())),
    };
    let world = match only {
        Some(acts) => world.only(acts.iter().copied()),
        None => world,
    };
    let log = world.log();
    let wrong = match catch_unwind(AssertUnwindSafe(|| world.run())) {
        Ok(Ok(_)) => None,
        Ok(Err(violation)) => Some(violation.to_string()),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            Some(format!("panic: {}", text.unwrap_or_default()))
        }
    };
    let mut acts = log.borrow().clone();
    acts.sort_unstable();
    (acts, wrong)
}

/// Leaves out what can be left out; `None` when nothing goes wrong.
#[must_use]
pub fn shrink(scenario: &Scenario) -> Option<Shrunk> {
    let (mut acts, wrong) = attempt(scenario, None);
    let (mut what, mut runs) = (wrong?, 1);
    loop {
        let before = acts.len();
        let mut size = before.div_ceil(2).max(1);
        loop {
            let mut at = 0;
            while at < acts.len() {
                let mut fewer = acts.clone();
                fewer.drain(at..acts.len().min(at + size));
                runs += 1;
                match attempt(scenario, Some(&fewer)) {
                    (left, Some(wrong)) => (acts, what) = (left, wrong),
                    (_, None) => at += size,
                }
            }
            if size == 1 {
                break;
            }
            size = size.div_ceil(2);
        }
        if acts.len() == before {
            return Some(Shrunk { acts, what, runs });
        }
    }
}
