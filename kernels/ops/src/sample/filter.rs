//! Top-k, top-p and min-p. Each keeps a beginning of one order: higher logits first, equal ones by
//! token. So a filter is a cut in that order, and nothing needs sorting but what lies at the cut.
//!
//! What is kept is gathered in the order of tokens, whatever found the cut. Invariant: the likeliest
//! token is always kept.

use super::choose::{CHUNK, Params};
use super::{Workspace, draw};
use crate::exp::{exp, weights as weigh};
use device::Isa;
use std::cmp::Ordering;

/// Candidates beyond the `k` best that are collected before the best are selected again.
const SLACK: usize = 256;
/// Stretches of logits whose mass is summed to find a cut.
const STRETCHES: usize = 1024;
/// Candidates that are simply sorted.
const FEW: usize = 64;
/// By how much a bound on logits is widened against rounding, in natural logs of weights.
const MARGIN: f32 = 0.01;

/// A token with its logit and its weight relative to the likeliest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Candidate {
    pub(super) logit: f32,
    pub(super) token: u32,
    pub(super) weight: f32,
}

impl Candidate {
    /// Likelier first, ties by token: a total order, since rows with NaN are refused before. Zeros of
    /// both signs are equal, as they are for every comparison elsewhere.
    fn order(&self, other: &Self) -> Ordering {
        let by_logit = other.logit.partial_cmp(&self.logit).unwrap_or(Ordering::Equal);
        by_logit.then(self.token.cmp(&other.token))
    }
}

/// The row and how logits become weights.
struct Row<'a> {
    logits: &'a [f32],
    /// The maximum of every chunk.
    tops: &'a [f32],
    highest: f32,
    /// One over the temperature.
    scale: f32,
}

impl Row<'_> {
    fn candidate(&self, token: usize, logit: f32) -> Candidate {
        let weight = exp((logit - self.highest) * self.scale);
        Candidate { logit, token: token as u32, weight }
    }

    /// Below this logit every weight is below `weight`.
    fn bound(&self, weight: f32) -> f32 {
        self.highest + (weight.ln() - MARGIN) / self.scale
    }

    /// Visits the tokens with a logit of at least `bound`, in order. A callback, since an iterator
    /// over chunks that are passed over costs several times as much per token.
    #[inline(always)]
    fn above(&self, bound: f32, mut visit: impl FnMut(usize, f32)) {
        for (index, (chunk, top)) in self.logits.chunks(CHUNK).zip(self.tops).enumerate() {
            if *top >= bound {
                for (at, logit) in chunk.iter().enumerate() {
                    if *logit >= bound {
                        visit(index * CHUNK + at, *logit);
                    }
                }
            }
        }
    }
}

/// Leaves in `workspace` the weights of what is kept, and its tokens, or no tokens where all are
/// kept. `workspace.tops` holds the maximum of every chunk.
pub(super) fn keep(
    isa: Isa,
    logits: &[f32],
    highest: f32,
    params: &Params<'_>,
    workspace: &mut Workspace,
) {
    let Workspace { tops, weights, tokens, ranked, sums } = workspace;
    // A temperature so low that its inverse overflows leaves the likeliest alone all the same.
    let scale = (1.0 / params.temperature).min(f32::MAX);
    let row = Row { logits, tops, highest, scale };
    tokens.clear();
    let k = params.top_k as usize;
    let some_k = k > 0 && k < logits.len();
    let some_p = params.top_p < 1.0;
    if !some_k && !some_p && params.min_p <= 0.0 {
        weights.resize(logits.len(), 0.0);
        weigh(isa, logits, highest, scale, weights);
        return;
    }
    let mut cut = None;
    if some_k {
        cut = top_k(&row, k, ranked);
    }
    if some_p {
        let p = f64::from(params.top_p);
        let found = if some_k {
            let whole: f64 = ranked.iter().map(|candidate| f64::from(candidate.weight)).sum();
            nucleus(ranked, p * whole)
        } else {
            weights.resize(logits.len(), 0.0);
            weigh(isa, logits, highest, scale, weights);
            let whole = draw::mass(weights, sums);
            nucleus_of_row(&row, weights, p, whole, ranked)
        };
        cut = found.or(cut);
    }
    gather(&row, cut, params.min_p, tokens, weights);
}

/// The `k` best into `ranked`, in no order; the last of them is the cut. Nothing is cut where there
/// are not more.
fn top_k(row: &Row<'_>, k: usize, ranked: &mut Vec<Candidate>) -> Option<Candidate> {
    ranked.clear();
    let (mut bound, mut cut) = (f32::NEG_INFINITY, None);
    for (index, (chunk, top)) in row.logits.chunks(CHUNK).zip(row.tops).enumerate() {
        if *top <= bound {
            continue;
        }
        for (token, logit) in (index * CHUNK..).zip(chunk) {
            // Of equal logits the first are kept, so a later one must be higher.
            if *logit > bound {
                ranked.push(row.candidate(token, *logit));
            }
        }
        if ranked.len() >= 2 * k + SLACK {
            let last = best(ranked, k);
            (bound, cut) = (last.logit, Some(last));
        }
    }
    if ranked.len() > k { Some(best(ranked, k)) } else { cut }
}

/// Leaves the `k` best, in no order, and returns the last of them; there are more than `k`.
fn best(ranked: &mut Vec<Candidate>, k: usize) -> Candidate {
    let last = *ranked.select_nth_unstable_by(k - 1, Candidate::order).1;
    ranked.truncate(k);
    last
}

/// The cut of top-p in a whole row. The mass of each of many stretches of logits tells in which of
/// them the cut lies, and only that one's tokens are ranked.
fn nucleus_of_row(
    row: &Row<'_>,
    weights: &[f32],
    p: f64,
    whole: f64,
    ranked: &mut Vec<Candidate>,
) -> Option<Candidate> {
    // Tokens lighter than (1 - p) / vocabulary of the whole weigh less than 1 - p together, so the
    // cut does not lie among them; half of it, against rounding.
    let bound = row.bound((0.5 * (1.0 - p) * whole / row.logits.len() as f64) as f32);
    let heavy = |logit: f32| if logit >= bound { logit } else { row.highest };
    let lowest = row.logits.iter().map(|logit| heavy(*logit)).fold(row.highest, f32::min);
    // Rounding is monotonic: a higher logit is never in a later stretch. Where all logits are
    // equal the product is not a number, which counts as the first.
    let per_logit = STRETCHES as f32 / (row.highest - lowest);
    let stretch = |logit| (((row.highest - logit) * per_logit) as usize).min(STRETCHES - 1);
    let mut masses = [0.0_f64; STRETCHES];
    row.above(bound, |token, logit| masses[stretch(logit)] += f64::from(weights[token]));
    let mut before = 0.0;
    let at = masses.iter().position(|mass| {
        let reached = before + mass >= p * whole;
        before += if reached { 0.0 } else { *mass };
        reached
    })?;
    ranked.clear();
    row.above(bound, |token, logit| {
        if stretch(logit) == at {
            ranked.push(row.candidate(token, logit));
        }
    });
    // The sum inside goes in another order and may end just short: then all of it is kept.
    nucleus(ranked, p * whole - before).or_else(|| ranked.last().copied())
}

/// The last candidate of the shortest beginning of the order that holds `target`; none where all
/// together do not; `ranked` is sorted where it matters. Halves the range that holds it, as quickselect
/// does, by mass instead of rank.
fn nucleus(ranked: &mut [Candidate], target: f64) -> Option<Candidate> {
    let weight = |candidate: &Candidate| f64::from(candidate.weight);
    let (mut begin, mut end) = (0, ranked.len());
    let mut before = 0.0;
    while end - begin > FEW {
        let middle = (end - begin) / 2;
        ranked[begin..end].select_nth_unstable_by(middle, Candidate::order);
        let upper: f64 = ranked[begin..begin + middle].iter().map(weight).sum();
        if before + upper >= target {
            end = begin + middle;
        } else {
            before += upper;
            begin += middle;
        }
    }
    ranked[begin..end].sort_unstable_by(Candidate::order);
    ranked[begin..end].iter().copied().find(|candidate| {
        before += weight(candidate);
        before >= target
    })
}

/// What lies at or before the cut and weighs at least `min_p`, in the order of tokens.
fn gather(
    row: &Row<'_>,
    cut: Option<Candidate>,
    min_p: f32,
    tokens: &mut Vec<u32>,
    weights: &mut Vec<f32>,
) {
    let (mut logit, mut token) = cut.map_or((f32::NEG_INFINITY, u32::MAX), |c| (c.logit, c.token));
    let bound = row.bound(min_p);
    if bound > logit {
        (logit, token) = (bound, u32::MAX);
    }
    weights.clear();
    row.above(logit, |at, x| {
        if x > logit || at as u32 <= token {
            let candidate = row.candidate(at, x);
            if candidate.weight >= min_p {
                tokens.push(candidate.token);
                weights.push(candidate.weight);
            }
        }
    });
}
