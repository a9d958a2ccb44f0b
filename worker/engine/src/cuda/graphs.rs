//! Captured bodies, one per kind of step. All but those with prompts behind a context are made before the
//! first step, so that no step waits for one; those, whose kinds are many, when a step of the kind has
//! been enqueued launch by launch, while the device runs that. Of these few are kept.
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

/// The graphs that there are.
#[derive(Debug, Default)]
pub(super) struct Graphs {
    by_kind: BTreeMap<Kind, (Graph, Vec<String>)>,
    /// Of kinds with passes, with the number of the step that used it last.
    later: BTreeMap<Kind, (Graph, Vec<String>, u64)>,
    /// Steps that asked until now.
    steps: u64,
    /// Whether one could not be made.
    failed: bool,
}

impl Graphs {
    /// With the names of the kernels in it.
    pub(super) fn insert(&mut self, kind: Kind, graph: Graph, kernels: Vec<String>) {
        self.by_kind.insert(kind, (graph, kernels));
    }

    /// Whether there is room for one more with passes; one that nobody used for long makes room.
    pub(super) fn has_room(&mut self) -> bool {
        if self.failed {
            return false;
        }
        if self.later.len() >= MOST_LATER {
            let oldest = self.later.iter().min_by_key(|(_, (.., used))| *used);
            let oldest = oldest.filter(|(_, (.., used))| used + UNUSED < self.steps);
            if let Some(kind) = oldest.map(|(kind, _)| *kind) {
                self.later.remove(&kind);
            }
        }
        self.later.len() < MOST_LATER
    }

    /// Keeps one of a kind with passes. Where it could not be made, as when memory is short, steps go on
    /// without, and none is tried again.
    pub(super) fn insert_later(
        &mut self,
        kind: Kind,
        made: Result<(Graph, Vec<String>), CudaError>,
    ) {
        match made {
            Ok((graph, kernels)) => drop(self.later.insert(kind, (graph, kernels, self.steps))),
            Err(_) => self.failed = true,
        }
    }

    /// The one of the step at hand; asked for once in every step.
    pub(super) fn get(&mut self, kind: Kind) -> Option<&Graph> {
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
}
