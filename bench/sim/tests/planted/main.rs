//! Proof that the simulation can fail: each planted bug, one at a time, must be found.
//!
//! The build script writes the sources once more, with a switch for every bug; this runs storms
//! with one switch on until something is wrong. With no switch on the copy must pass.

mod bugs;

#[allow(warnings, clippy::all)]
#[allow(clippy::disallowed_types, clippy::print_stdout, clippy::unwrap_used)]
mod planted {
    include!(concat!(env!("OUT_DIR"), "/planted.rs"));
}

use bugs::{BUGS, UNFAIR};
use planted::sim::Scenario;
use planted::sim::act::Act;
use planted::sim::scenario::Model;
use planted::sim::shrink::{attempt, shrink};
use std::fs;
use std::ops::Range;
use std::panic::catch_unwind;
use std::path::Path;
use std::sync::Mutex;

/// Which bug is active in this thread.
mod switch {
    use std::cell::Cell;

    /// A bug that makes the scheduler spin asks for itself more often than any run.
    const MOST: u64 = 20_000_000;

    thread_local! {
        static ACTIVE: Cell<Option<usize>> = const { Cell::new(None) };
        static ASKED: Cell<u64> = const { Cell::new(0) };
    }

    /// Switches one bug on, or all off.
    pub(crate) fn turn(bug: Option<usize>) {
        ACTIVE.set(bug);
        ASKED.set(0);
    }

    /// Whether a bug is active.
    pub(crate) fn on(bug: usize) -> bool {
        let active = ACTIVE.get() == Some(bug);
        if active {
            ASKED.set(ASKED.get() + 1);
            assert!(ASKED.get() < MOST, "the scheduler spins");
        }
        active
    }
}

/// Events of a run.
const EVENTS: u64 = 5000;

/// The storms of a seed.
fn storms(seed: u64, events: u64) -> impl Iterator<Item = Scenario> {
    let models = [Model::Mixed, Model::Full, Model::Sliding];
    let all = models.into_iter().flat_map(|model| [2, 1, 0].map(|depth| (model, depth)));
    all.map(move |(model, depth)| Scenario::storm(seed, events, depth, model).expect("carves"))
}

/// Runs storms until one goes wrong, those first in which the bug is likely to show; says in which and how.
fn hunt(bug: Option<usize>, seeds: u64, compared: bool) -> Option<(Scenario, String)> {
    let likely = |seed: &u64| match bug.map(|at| &BUGS[at]) {
        Some(bug) if bug.file.1.starts_with("shards/") => seed % 6 == 3,
        Some(bug) if bug.name.contains("behind the cache") => seed % 12 == 8,
        Some(_) | None => true,
    };
    let (first, last): (Vec<_>, Vec<_>) = (0..seeds).partition(likely);
    let storms = first.into_iter().chain(last).flat_map(|seed| storms(seed, EVENTS));
    storms.map(|storm| Scenario { compared, ..storm }).find_map(|scenario| {
        let wrong = attempt(&scenario, None).1?;
        Some((scenario, wrong))
    })
}

/// Does something for every bug that storms find, two at a time.
fn for_every_bug(each: impl Fn(usize) + Sync) {
    for_bugs(0..BUGS.len(), each);
}

fn for_bugs(bugs: Range<usize>, each: impl Fn(usize) + Sync) {
    let next = Mutex::new(bugs);
    let work = || {
        while let Some(at) = next.lock().ok().and_then(|mut next| next.next()) {
            switch::turn(Some(at));
            each(at);
        }
    };
    quietly(|| std::thread::scope(|scope| (0..2).for_each(|_| drop(scope.spawn(work)))));
}

fn quietly<T>(run: impl FnOnce() -> T) -> T {
    // Panics are expected; their messages are reported as what was found.
    std::panic::set_hook(Box::new(|_| ()));
    let result = run();
    let _ = std::panic::take_hook();
    result
}

#[test]
fn every_planted_bug_is_found() {
    assert!(planted::NOT_FOUND.is_empty(), "lines changed: {:#?}", planted::NOT_FOUND);
    switch::turn(None);
    assert_eq!(hunt(None, 1, true).map(|(_, what)| what), None, "with no bug the copy must pass");
    let missed = Mutex::new(Vec::new());
    for_every_bug(|at| {
        let name = BUGS[at].name;
        match hunt(Some(at), 40, true) {
            Some((scenario, what)) => {
                let what: String =
                    what.lines().next().unwrap_or_default().chars().take(120).collect();
                eprintln!("found: {name}: seed {}: {what}", scenario.seed);
            }
            None => missed.lock().expect("no panic under it").push(name),
        }
    });
    let missed = missed.into_inner().expect("no panic under it");
    assert!(missed.is_empty(), "not found: {missed:#?}");
}

/// The first promise that is not held, and the words of its test.
fn broken_promise() -> Option<(&'static str, String)> {
    planted::PROMISES.iter().find_map(|(promise, test)| {
        let payload = catch_unwind(*test).err()?;
        let words = payload.downcast_ref::<String>().cloned();
        let words =
            words.or_else(|| payload.downcast_ref::<&str>().map(|words| (*words).to_owned()));
        Some((*promise, words.unwrap_or_default()))
    })
}

#[test]
fn every_unfair_bug_breaks_a_promise() {
    assert_eq!(planted::PROMISES.len(), 15, "the tests of fairness and overload");
    switch::turn(None);
    assert_eq!(broken_promise(), None, "with no bug the copy must pass");
    let missed = Mutex::new(Vec::new());
    for_bugs(BUGS.len()..BUGS.len() + UNFAIR.len(), |at| {
        let name = UNFAIR[at - BUGS.len()].name;
        match broken_promise() {
            Some((promise, words)) => {
                let words: String = words.chars().take(120).collect();
                eprintln!("found: {name}: {promise}: {}", words.replace('\n', " "));
            }
            None => missed.lock().expect("no panic under it").push(name),
        }
    });
    let missed = missed.into_inner().expect("no panic under it");
    assert!(missed.is_empty(), "not found: {missed:#?}");
}

fn bug(name: &str) -> usize {
    BUGS.iter().position(|bug| bug.name == name).unwrap_or_else(|| panic!("no bug is that {name}"))
}

#[test]
fn minimised_runs_show_their_bugs_and_nothing_else() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/planted/traces.txt");
    let traces = fs::read_to_string(path).expect("the minimised runs");
    let (mut runs, mut complaints) = (0, Vec::new());
    for line in traces.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let [name, world, acts] = line.split(" | ").collect::<Vec<_>>()[..] else {
            panic!("not a bug, a world and acts: {line}");
        };
        let [seed, depth, model] = world.split(' ').collect::<Vec<_>>()[..] else {
            panic!("not a seed, a depth and a model: {line}");
        };
        let mut worlds = storms(seed.parse().expect("a seed"), EVENTS);
        let world = worlds.find(|s| s.config.depth.to_string() == depth && s.model == model);
        let world = world.expect("a depth and a model");
        let acts = acts.split(',').map(|act| act.parse().expect("an act"));
        let acts: Vec<Act> = acts.collect();
        for planted in [Some(bug(name)), None] {
            switch::turn(planted);
            let (_, wrong) = quietly(|| attempt(&world, Some(&acts)));
            if wrong.is_some() != planted.is_some() {
                complaints.push((name.to_owned(), planted, wrong));
            }
        }
        runs += 1;
    }
    assert!(complaints.is_empty(), "shrink them again: {complaints:#?}");
    assert!(runs >= 10, "{runs} minimised runs");
}

#[test]
#[ignore = "shrinks a run for every bug, minutes"]
fn shrink_a_run_for_every_bug() {
    for_every_bug(|at| {
        let name = BUGS[at].name;
        if std::env::var("BUG").is_ok_and(|part| !name.contains(&part)) {
            return;
        }
        let Some((world, _)) = hunt(Some(at), 12, true) else { return };
        let Some(shrunk) = shrink(&world) else { return };
        let acts: Vec<_> = shrunk.acts.iter().map(Act::to_string).collect();
        let (seed, depth, model) = (world.seed, world.config.depth, world.model);
        eprintln!("{name} | {seed} {depth} {model} | {}", acts.join(","));
    });
}

#[test]
#[ignore = "runs many storms for every bug, minutes"]
fn which_bugs_are_found_without_the_model() {
    for_every_bug(|at| {
        let found = hunt(Some(at), 8, false).map_or("-".to_owned(), |(scenario, what)| {
            let what: String = what.lines().next().unwrap_or_default().chars().take(120).collect();
            format!("seed {}: {what}", scenario.seed)
        });
        eprintln!("{}: {found}", BUGS[at].name);
    });
}
