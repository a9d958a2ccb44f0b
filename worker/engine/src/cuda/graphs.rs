//! Captured bodies, one per kind of step. All but those with prompts behind a context are made before the
//! first step, so that no step waits for one; those, whose kinds are many, when a step of the kind has
//! been enqueued launch by launch, while the device runs that: making one takes the host some milliseconds
//! and stops nothing there. Of these few are kept, and no more than fit what a plan of memory sets aside.
//!
//! A graph holds addresses: whoever keeps graphs keeps the memory behind them. Invariant: a step of a
//! kind differs from another of that kind in what its inputs hold, never in its launches.

use super::limits::Limits;
use crate::flight::MOST_FLIGHTS;
use device::cuda::{CudaError, Graph};
use std::collections::BTreeMap;

/// Which rows of a step run latent attention in the absorbed form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Absorbed {
    /// None: all are of prompts that run expanded.
    Nothing,
    /// Those that decode.
    Decodes,
    /// Those of chunks too.
    Chunks,
}

/// Most passes over prompts behind a context that captured steps have.
pub(super) const MOST_PASSES: usize = 4;

/// Most graphs of steps with such passes that are kept, and steps after which one that nobody used gives
/// way: where there are more kinds than that, capturing must not become what steps wait for.
const MOST_LATER: usize = 64;
const UNUSED: u64 = 1024;
// Those that may still run stay.
const _: () = assert!(UNUSED > MOST_FLIGHTS as u64);

/// Bytes of device memory that graphs may take: a plan of memory sets them aside. Those made before the first
/// step are there in any case; those made while serving are not kept beyond.
pub const GRAPH_BYTES: u64 = 512 << 20;

/// Passes over prompts behind a context: what the tokens of each are padded to, zeros behind the last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Later([usize; MOST_PASSES]);

impl Later {
    /// None of them.
    pub(super) const NONE: Self = Self([0; MOST_PASSES]);

    /// Of a step's passes; `None` where they are too many for a kind.
    pub(super) fn of(passes: &[usize]) -> Option<Self> {
        let mut of = [0; MOST_PASSES];
        of.get_mut(..passes.len())?.copy_from_slice(passes);
        Some(Self(of))
    }
}

/// What launches depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Kind {
    /// Padded rows.
    pub(super) bucket: usize,
    /// Whether a segment has several rows.
    pub(super) prompts: bool,
    /// Of a step with prompts that may run expanded; others say that chunks do.
    pub(super) absorbed: Absorbed,
    /// Whether all tokens that are drawn with it are just the likeliest.
    pub(super) greedy: bool,
    /// Whether latent attention of its few rows of short contexts takes one launch.
    pub(super) near: bool,
    /// Of a step with prompts that may run expanded.
    pub(super) later: Later,
    /// Whether there may be prompts that lie in it as a whole; always in steps without passes.
    pub(super) whole: bool,
}

/// Every kind of step within limits but those with prompts behind a context. Only requests that decode are a
/// row each, so without prompt chunks a step has at most as many rows as there are slots. Contexts may be near
/// in steps of up to `near` rows. Prompts may run expanded where the program `expands`.
pub(super) fn kinds(limits: &Limits, near: usize, expands: bool) -> Vec<Kind> {
    let slots = limits.bucket(limits.slots.min(limits.rows));
    let buckets = limits.buckets().into_iter();
    buckets
        .flat_map(|bucket| {
            // Draws behind prompt chunks are not part of the graph.
            let draws = [(false, false), (false, true), (true, false)];
            draws.into_iter().flat_map(move |(prompts, greedy)| {
                [false, true].into_iter().flat_map(move |near| {
                    [Absorbed::Nothing, Absorbed::Decodes, Absorbed::Chunks].map(|absorbed| Kind {
                        bucket,
                        prompts,
                        absorbed,
                        greedy,
                        near,
                        later: Later::NONE,
                        whole: true,
                    })
                })
            })
        })
        .filter(|kind| kind.absorbed == Absorbed::Chunks || (kind.prompts && expands))
        .filter(|kind| if kind.prompts { kind.bucket > 1 } else { kind.bucket <= slots })
        .filter(|kind| !kind.near || (!kind.prompts && kind.bucket <= near))
        .collect()
}

/// What a captured kind of step launches; for reports and tests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Captured {
    /// Padded rows.
    pub rows: usize,
    /// Whether it is for steps with prompt chunks.
    pub prompts: bool,
    /// Whether some of them are behind a context, whose keys are gathered.
    pub later: bool,
    /// Whether it draws just the likeliest tokens.
    pub greedy: bool,
    /// Names of its kernels, in alphabetical order.
    pub kernels: Vec<String>,
}

/// Most that a node is taken to need: 9 KiB were seen.
const NODE_BYTES: u64 = 16 << 10;

/// Bytes of device memory that went while graphs of so many nodes were made, as far as they can have taken them:
/// what is free is free to other processes too.
pub(super) fn gone(before: usize, after: usize, nodes: usize) -> u64 {
    (before.saturating_sub(after) as u64).min(nodes as u64 * NODE_BYTES)
}

/// A graph that is made while serving.
#[derive(Debug)]
pub(super) struct Made<G = Graph> {
    pub(super) graph: G,
    /// Names of its kernels.
    pub(super) kernels: Vec<String>,
    /// Of device memory.
    pub(super) bytes: u64,
}

/// The graphs that there are.
#[derive(Debug)]
pub(super) struct Graphs<G = Graph> {
    by_kind: BTreeMap<Kind, (G, Vec<String>)>,
    /// Of kinds with passes, with the number of the step that used it last.
    later: BTreeMap<Kind, (G, Vec<String>, u64)>,
    /// Steps that asked until now.
    steps: u64,
    /// Bytes of device memory that all of them took, and the most that one with passes did. What one leaves
    /// the driver keeps for the next.
    taken: u64,
    most: u64,
    /// Whether it was told that memory is used up.
    told: bool,
    /// Whether no more are made.
    closed: bool,
    notes: Vec<String>,
}

impl<G> Graphs<G> {
    pub(super) const fn new() -> Self {
        Self {
            by_kind: BTreeMap::new(),
            later: BTreeMap::new(),
            steps: 0,
            taken: 0,
            most: 0,
            told: false,
            closed: false,
            notes: Vec::new(),
        }
    }

    /// With the names of the kernels in it.
    pub(super) fn insert(&mut self, kind: Kind, graph: G, kernels: Vec<String>) {
        self.by_kind.insert(kind, (graph, kernels));
    }

    /// All that are made before the first step are there, in so many bytes of device memory.
    pub(super) fn took(&mut self, bytes: u64) {
        self.taken = bytes;
        self.notes.push(format!(
            "graphs of {} kinds of steps take {} MiB, {} MiB are set aside; up to {MOST_LATER} more are \
             made while serving, of prompts behind a context",
            self.by_kind.len(),
            bytes >> 20,
            GRAPH_BYTES >> 20,
        ));
    }

    /// Whether there is room for one more with passes; one that nobody used for long makes room.
    pub(super) fn has_room(&mut self) -> bool {
        if self.closed {
            return false;
        }
        let short = self.taken.saturating_add(self.most) > GRAPH_BYTES;
        if self.later.len() < MOST_LATER && !short {
            return true;
        }
        let oldest = self.later.iter().min_by_key(|(_, (.., used))| *used);
        let oldest = oldest.filter(|(_, (.., used))| used + UNUSED < self.steps);
        if let Some(kind) = oldest.map(|(kind, _)| *kind) {
            self.later.remove(&kind);
            return true;
        }
        if short && !self.told {
            self.told = true;
            self.note_memory();
        }
        false
    }

    /// Keeps one of a kind with passes. Where it could not be made, or took more memory than there was to
    /// take, steps go on without, and none is tried again.
    pub(super) fn insert_later(&mut self, kind: Kind, made: Result<Made<G>, CudaError>) {
        match made {
            Ok(made) => {
                self.taken = self.taken.saturating_add(made.bytes);
                self.most = self.most.max(made.bytes);
                if self.taken > GRAPH_BYTES {
                    self.closed = true;
                    return self.note_memory();
                }
                self.later.insert(kind, (made.graph, made.kernels, self.steps));
            }
            Err(error) => {
                self.closed = true;
                self.notes.push(format!(
                    "a step of {} rows with prompts behind a context cannot be captured ({error}): {} \
                     graphs of such steps stay, others are launched op by op",
                    kind.bucket,
                    self.later.len(),
                ));
            }
        }
    }

    fn note_memory(&mut self) {
        self.notes.push(format!(
            "graphs take {} MiB of the {} MiB set aside: {} of steps with prompts behind a context stay, \
             other such steps are launched op by op",
            self.taken >> 20,
            GRAPH_BYTES >> 20,
            self.later.len(),
        ));
    }

    /// What an operator may want to know, once.
    pub(super) fn take_notes(&mut self) -> Vec<String> {
        std::mem::take(&mut self.notes)
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.by_kind.len() + self.later.len()
    }

    /// The one of the step at hand; asked for once in every step.
    pub(super) fn get(&mut self, kind: Kind) -> Option<&G> {
        self.steps += 1;
        if kind.later == Later::NONE {
            return self.by_kind.get(&kind).map(|(graph, _)| graph);
        }
        let (graph, _, used) = self.later.get_mut(&kind)?;
        *used = self.steps;
        Some(graph)
    }

    /// What each launches.
    pub(super) fn captured(&self) -> impl Iterator<Item = Captured> {
        let later = self.later.iter().map(|(kind, (_, kernels, _))| (kind, kernels));
        let all = self.by_kind.iter().map(|(kind, (_, kernels))| (kind, kernels)).chain(later);
        all.map(|(kind, kernels)| Captured {
            rows: kind.bucket,
            prompts: kind.prompts,
            later: kind.later != Later::NONE,
            greedy: kind.greedy,
            kernels: kernels.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_has_a_kind() {
        let limits = Limits { rows: 1000, slots: 20, context: 1, multiprocessors: 1 };
        let all = kinds(&limits, 2, true);
        let kinds = kinds(&limits, 2, false);
        let (absorbed, later) = (Absorbed::Chunks, Later::NONE);
        assert!(kinds.iter().all(|kind| kind.absorbed == absorbed && all.contains(kind)));
        for rows in 1..=limits.rows {
            let bucket = limits.bucket(rows);
            let whole = true;
            let kind =
                Kind { bucket, prompts: true, absorbed, greedy: false, near: false, later, whole };
            assert_eq!(kinds.contains(&kind), rows > 1);
            for absorbed in [Absorbed::Nothing, Absorbed::Decodes] {
                assert_eq!(all.contains(&Kind { absorbed, ..kind }), rows > 1);
            }
            for (greedy, near) in [(false, false), (true, false), (false, true), (true, true)] {
                let kind = Kind { bucket, prompts: false, absorbed, greedy, near, later, whole };
                let is_there = rows <= limits.slots && (!near || rows <= 2);
                assert!(!is_there || kinds.contains(&kind));
            }
        }
        assert_eq!(Later::of(&[]), Some(later));
        assert!(Later::of(&[1024; MOST_PASSES]).is_some_and(|of| of != later));
        assert_eq!(Later::of(&[1024; MOST_PASSES + 1]), None);
        assert!(kinds.len() < 60 && all.len() < 100, "{} and {}", kinds.len(), all.len());
    }

    fn kind(tokens: usize) -> Kind {
        Kind {
            bucket: 1024,
            prompts: true,
            absorbed: Absorbed::Decodes,
            greedy: false,
            near: false,
            later: Later::of(&[tokens]).expect("one pass"),
            whole: false,
        }
    }

    fn made(bytes: u64) -> Result<Made<()>, CudaError> {
        Ok(Made { graph: (), kernels: Vec::new(), bytes })
    }

    /// Makes graphs as steps do until there is no room; how many.
    fn fill(graphs: &mut Graphs<()>, bytes: u64) -> usize {
        let mut count = 0;
        for tokens in 1..MOST_LATER + 9 {
            assert!(graphs.get(kind(tokens)).is_none());
            if !graphs.has_room() {
                break;
            }
            graphs.insert_later(kind(tokens), made(bytes));
            count += 1;
        }
        count
    }

    #[test]
    fn graphs_made_while_serving_fit_what_is_set_aside() {
        let mut graphs = Graphs::new();
        graphs.took(GRAPH_BYTES / 2);
        assert!(graphs.take_notes()[0].contains("256 MiB, 512 MiB are set aside"));
        assert_eq!(fill(&mut graphs, 8 << 20), 32);
        let notes = graphs.take_notes();
        assert!(notes.len() == 1 && notes[0].contains("512 MiB of the 512 MiB"), "{notes:?}");
        assert!(!graphs.has_room() && graphs.take_notes().is_empty(), "said once");
        // One that nobody used makes room, in the memory that it leaves.
        (0..=UNUSED).for_each(|_| assert!(graphs.get(kind(2)).is_some()));
        assert!(graphs.get(kind(40)).is_none() && graphs.has_room());
        graphs.insert_later(kind(40), made(0));
        assert!(graphs.get(kind(1)).is_none() && graphs.get(kind(40)).is_some());
        // Where it leaves less than the next one takes, that is the last.
        assert!(graphs.has_room());
        graphs.insert_later(kind(41), made(2 << 20));
        assert!(graphs.get(kind(41)).is_none() && !graphs.has_room());
        assert!(graphs.take_notes()[0].contains("514 MiB of the 512 MiB"));
    }

    #[test]
    fn what_others_take_of_a_device_is_not_put_on_graphs() {
        assert_eq!(gone(64 << 20, 60 << 20, 400), 4 << 20);
        assert_eq!(gone(64 << 30, 60 << 30, 400), 400 * NODE_BYTES);
        assert_eq!(gone(60 << 30, 64 << 30, 400), 0);
    }

    #[test]
    fn small_graphs_are_as_many_as_are_kept() {
        let mut graphs = Graphs::new();
        graphs.took(0);
        assert_eq!(fill(&mut graphs, 1 << 20), MOST_LATER);
        assert_eq!((graphs.len(), graphs.take_notes().len()), (MOST_LATER, 1));
    }

    #[test]
    fn a_failure_is_said_and_not_repeated() {
        let mut graphs = Graphs::new();
        assert!(graphs.has_room());
        graphs.insert_later(kind(1), made(0));
        let code = "CUDA_ERROR_OUT_OF_MEMORY".to_owned();
        graphs.insert_later(kind(2), Err(CudaError::Call { call: "cuGraphInstantiate", code }));
        assert!(!graphs.has_room() && graphs.get(kind(1)).is_some());
        let notes = graphs.take_notes();
        assert!(notes.len() == 1 && notes[0].contains("OUT_OF_MEMORY"), "{notes:?}");
    }
}
