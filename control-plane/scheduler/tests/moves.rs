//! Every pair of state and move: what is legal compiles, what is not does not.
//!
//! States and moves are read from `src/request.rs`, so that none can be forgotten here; which pairs are
//! legal is said a second time below, so that none becomes legal by accident. `TRYBUILD=overwrite` writes
//! the cases anew. Moves of clients (abort, stop, expire, forced preemption) depend on what a request does
//! at that moment and are checked at run time: docs/how-to/add-a-request-state.md lists them, and the last
//! test here holds the list to what the scheduler does.

#[path = "../../kv-cache/tests/matrix/mod.rs"]
mod matrix;
mod rig;

use ids::{RequestId, Tokens};
use matrix::{Cell, Matrix};
use rig::Rig;
use scheduler::{Event, Role};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

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

const OPENING: &str = "use scheduler::request::*;\n\nfn any<T>() -> T {\n    loop {}\n}\n";

/// What the source says: states in order, moves with the number of their arguments, and who has which.
#[derive(Default)]
struct Machine {
    states: Vec<&'static str>,
    moves: BTreeMap<&'static str, usize>,
    has: BTreeSet<(&'static str, &'static str)>,
}

impl Machine {
    /// States are the types `Request` is implemented for, moves their public functions that take it.
    fn read() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/request.rs");
        let source: &'static str = fs::read_to_string(path).expect("the source is there").leak();
        let mut machine = Self::default();
        let mut lines = source.lines();
        while let Some(line) = lines.next() {
            let line = line.trim();
            if let Some(state) = line.strip_prefix("impl Request<") {
                machine.states.extend(state.split('>').next());
            }
            let Some((name, rest)) = line.strip_prefix("pub fn ").and_then(|f| f.split_once('('))
            else {
                continue;
            };
            // A signature may be spread over lines.
            let rest = if rest.is_empty() { lines.next().unwrap_or("").trim() } else { rest };
            if let (Some(state), true) = (machine.states.last(), rest.starts_with("self")) {
                let arguments = rest.split(')').next().unwrap_or(rest).matches(": ").count();
                machine.moves.insert(name, arguments);
                machine.has.insert((state, name));
            }
        }
        machine
    }

    fn cell(&self, state: &'static str, made: &'static str) -> Cell {
        let arguments = vec!["any()"; self.moves[made]].join(", ");
        let function = format!(
            "fn {}_{made}(request: Request<{state}>) {{\n    let _ = request.{made}({arguments});\n}}\n",
            state.to_lowercase()
        );
        Cell { state, function, legal: LEGAL.contains(&(state, made)) }
    }
}

#[test]
fn only_legal_moves_compile() {
    let machine = Machine::read();
    assert_eq!(machine.has, BTreeSet::from(LEGAL), "left: src/request.rs, right: the table here");
    let states = machine.states.iter();
    let cells = states.flat_map(|state| machine.moves.keys().map(|made| machine.cell(state, made)));
    let root = env!("CARGO_MANIFEST_DIR");
    Matrix { root, opening: OPENING, cells: cells.collect() }.hold();
}

/// The rows of the table under a heading of the page: cells without their marks.
fn table(heading: &str) -> Vec<Vec<String>> {
    let path = "../../docs/how-to/add-a-request-state.md";
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path));
    let page = page.expect("the page is there");
    let (_, below) =
        page.split_once(heading).unwrap_or_else(|| panic!("{path} has no {heading:?}"));
    let rows = below.lines().skip_while(|line| !line.starts_with('|'));
    let rows = rows.take_while(|line| line.starts_with('|'));
    let cells = |line: &str| {
        let cells = line.trim_matches('|').split('|');
        cells.map(|cell| cell.trim().trim_matches('`').to_owned()).collect()
    };
    rows.map(cells).collect()
}

#[test]
fn the_page_has_the_matrix() {
    let rows = table("## The matrix");
    let moves = &rows[0][1..];
    let mut found = BTreeSet::new();
    for row in &rows[2..] {
        for (made, mark) in moves.iter().zip(&row[1..]) {
            if mark == "yes" {
                found.insert((row[0].clone(), made.clone()));
            }
        }
    }
    let legal = LEGAL.iter().map(|(state, made)| ((*state).to_owned(), (*made).to_owned()));
    assert_eq!(found, legal.collect(), "left: the page, right: the table here");
    let machine = Machine::read();
    assert_eq!((rows.len() - 2, moves.len()), (machine.states.len(), machine.moves.len()));
}

/// A rig with request 1 in a state.
fn brought_to(state: &str) -> Rig {
    let mut rig = Rig::new(1, 0);
    if state == "Queued" {
        rig.submit(1, 300, 50);
        return rig;
    }
    rig.ready(64);
    // Five chunks, then three tokens; three steps are always under way.
    rig.submit(1, 600, 50);
    (0..7).for_each(|_| assert!(rig.step()));
    match state {
        "Preempted" => rig.lose(),
        "Prefilling" => {
            rig.turn(Some(Event::ForcePreempt(RequestId(1))));
            (0..3).for_each(|_| assert!(rig.step()));
        }
        "Decoding" => {}
        "Closing" => rig.turn(Some(Event::Abort(RequestId(1)))),
        other => panic!("how does a request come to be {other}?"),
    }
    let ran = rig.history(1).steps.last().map(|step| step.role == Role::Decode);
    assert_eq!(ran, Some(state != "Prefilling"), "{state}");
    assert_eq!(rig.tokens[&RequestId(1)], 3);
    rig
}

#[test]
fn the_page_lists_what_is_decided_at_run_time() {
    let rows = table("## What stays at run time");
    let machine = Machine::read();
    let stored: Vec<&str> = machine.states.iter().copied().filter(|s| *s != "Finished").collect();
    let listed: Vec<&str> = rows[2..].iter().map(|row| &*row[0]).collect();
    assert_eq!(listed, stored, "every state that is stored has a row");
    for row in &rows[2..] {
        for (made, expected) in rows[0][1..].iter().zip(&row[1..]) {
            let mut rig = brought_to(&row[0]);
            let before = (rig.ended.len(), refused(&rig));
            let request = RequestId(1);
            let preempted = rig.scheduler.gauges().preemptions;
            match &**made {
                "abort" => rig.turn(Some(Event::Abort(request))),
                "stop" => rig.turn(Some(Event::Stop { request, keep: Tokens(1) })),
                "deadline" => rig.expire(),
                "preempt" => rig.turn(Some(Event::ForcePreempt(request))),
                other => panic!("what is {other}?"),
            }
            let found = if rig.ended.len() > before.0 {
                "ends"
            } else if refused(&rig) > before.1 {
                "refused"
            } else if rig.scheduler.gauges().preemptions > preempted {
                "in line again"
            } else {
                "nothing"
            };
            assert_eq!(found, expected, "{} and {made}", row[0]);
        }
    }
}

fn refused(rig: &Rig) -> u64 {
    rig.scheduler.gauges().refused.iter().sum()
}
