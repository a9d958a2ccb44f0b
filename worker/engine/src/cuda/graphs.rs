//! Captured bodies, one per kind of step, made before the first step so that no step waits for one.
//!
//! A graph holds addresses: whoever keeps graphs keeps the memory behind them. Invariant: a step of a
//! kind differs from another of that kind in what its inputs hold, never in its launches.

use super::limits::Limits;
use device::cuda::Graph;
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
}

/// Every kind of step within limits. Only requests that decode are a row each, so without prompt
/// chunks a step has at most as many rows as there are slots. Contexts may be near in steps of up to
/// `near` rows. Prompts may run expanded where the program `expands`.
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
    /// Whether it draws just the likeliest tokens.
    pub greedy: bool,
    /// Names of its kernels, in alphabetical order.
    pub kernels: Vec<String>,
}

/// The graphs that there are.
#[derive(Debug, Default)]
pub(super) struct Graphs {
    by_kind: BTreeMap<Kind, (Graph, Vec<String>)>,
}

impl Graphs {
    /// With the names of the kernels in it.
    pub(super) fn insert(&mut self, kind: Kind, graph: Graph, kernels: Vec<String>) {
        self.by_kind.insert(kind, (graph, kernels));
    }

    pub(super) fn get(&self, kind: Kind) -> Option<&Graph> {
        self.by_kind.get(&kind).map(|(graph, _)| graph)
    }

    /// What each launches.
    pub(super) fn captured(&self) -> impl Iterator<Item = Captured> {
        self.by_kind.iter().map(|(kind, (_, kernels))| Captured {
            rows: kind.bucket,
            prompts: kind.prompts,
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
        let absorbed = Absorbed::Chunks;
        assert!(kinds.iter().all(|kind| kind.absorbed == absorbed && all.contains(kind)));
        for rows in 1..=limits.rows {
            let bucket = limits.bucket(rows);
            let kind = Kind { bucket, prompts: true, absorbed, greedy: false, near: false };
            assert_eq!(kinds.contains(&kind), rows > 1);
            for absorbed in [Absorbed::Nothing, Absorbed::Decodes] {
                assert_eq!(all.contains(&Kind { absorbed, ..kind }), rows > 1);
            }
            for (greedy, near) in [(false, false), (true, false), (false, true), (true, true)] {
                let kind = Kind { bucket, prompts: false, absorbed, greedy, near };
                let is_there = rows <= limits.slots && (!near || rows <= 2);
                assert!(!is_there || kinds.contains(&kind));
            }
        }
        assert!(kinds.len() < 60 && all.len() < 100, "{} and {}", kinds.len(), all.len());
    }
}
