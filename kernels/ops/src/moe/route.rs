//! From router logits to experts and weights, as DeepSeek-V2, DeepSeek-V3 and Qwen3-MoE choose.
//!
//! Scores come from a softmax over all experts or a sigmoid of each. A correction bias moves the
//! choice and never the weights. Groups of experts may be limited to the best few. Of equal scores
//! the lower number wins, so a choice never depends on the batch.

use crate::share::Shared;
use device::ThreadPool;

/// The most experts of one layer.
pub const MAX_EXPERTS: usize = 1024;

/// How logits become scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// Over all experts.
    Softmax,
    /// Each by itself.
    Sigmoid,
}

/// How a group is scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupScore {
    /// By its best expert (DeepSeek-V2).
    Max,
    /// By the sum of its best two (DeepSeek-V3).
    SumTop2,
}

/// Choice limited to the best groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupLimit {
    /// Groups in all, of equal size.
    pub groups: usize,
    /// Groups that may be chosen from.
    pub chosen: usize,
    /// How they are compared.
    pub score: GroupScore,
}

/// How to choose.
#[derive(Clone, Copy, Debug)]
pub struct Router<'a> {
    /// Experts in all.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Logits to scores.
    pub scoring: Scoring,
    /// Limit to groups.
    pub limit: Option<GroupLimit>,
    /// Added to scores for the choice only, `[experts]`.
    pub correction: Option<&'a [f32]>,
    /// Chosen weights are divided by their sum.
    pub norm_topk: bool,
    /// Chosen weights are multiplied by this at the end.
    pub scale: f32,
}

impl Router<'_> {
    fn check(&self) {
        assert!(self.experts <= MAX_EXPERTS, "at most {MAX_EXPERTS} experts");
        assert!((1..=self.experts).contains(&self.top_k), "{} of {}", self.top_k, self.experts);
        assert!(self.correction.is_none_or(|bias| bias.len() == self.experts), "one bias each");
        if let Some(GroupLimit { groups, chosen, .. }) = self.limit {
            let size = self.experts.checked_div(groups).unwrap_or(0);
            assert_eq!(size * groups, self.experts, "groups of equal size");
            assert!(chosen <= groups && chosen * size >= self.top_k, "enough experts in reach");
        }
    }

    /// One token: `chosen` and `weights` have `top_k` elements.
    fn choose(&self, logits: &[f32], chosen: &mut [u32], weights: &mut [f32]) {
        let mut scores = [0.0_f32; MAX_EXPERTS];
        let scores = &mut scores[..self.experts];
        match self.scoring {
            Scoring::Softmax => softmax(logits, scores),
            Scoring::Sigmoid => {
                scores.iter_mut().zip(logits).for_each(|(s, l)| *s = 1.0 / (1.0 + (-l).exp()));
            }
        }
        let mut order = [0.0_f32; MAX_EXPERTS];
        let order = &mut order[..self.experts];
        order.copy_from_slice(scores);
        if let Some(correction) = self.correction {
            order.iter_mut().zip(correction).for_each(|(s, bias)| *s += bias);
        }
        if let Some(limit) = self.limit {
            close_groups(limit, order);
        }
        for (slot, weight) in chosen.iter_mut().zip(&mut *weights) {
            let best = highest(order);
            order[best] = f32::NEG_INFINITY;
            (*slot, *weight) = (best as u32, scores[best]);
        }
        // The reference adds 1e-20 against a zero sum; a softmax's top weights never are one.
        let sum: f32 = weights.iter().sum::<f32>() + 1e-20;
        let factor = if self.norm_topk { self.scale / sum } else { self.scale };
        weights.iter_mut().for_each(|weight| *weight *= factor);
    }
}

/// Chooses for every token: `logits` is `[tokens, experts]`, the outputs `[tokens, top_k]`.
///
/// # Panics
/// When the lengths do not fit.
pub fn route(
    pool: &ThreadPool,
    logits: &[f32],
    router: &Router<'_>,
    chosen: &mut [u32],
    weights: &mut [f32],
) {
    router.check();
    let (experts, k) = (router.experts, router.top_k);
    let tokens = logits.len() / experts;
    assert_eq!(logits.len(), tokens * experts, "one logit per expert");
    assert!(chosen.len() == tokens * k && weights.len() == tokens * k, "top_k per token");
    let (chosen, weights) = (Shared::new(chosen), Shared::new(weights));
    pool.run(tokens, &|token| {
        // SAFETY: one row of each output per item.
        let (chosen, weights) = unsafe { (chosen.part(token * k, k), weights.part(token * k, k)) };
        router.choose(&logits[token * experts..(token + 1) * experts], chosen, weights);
    });
}

fn softmax(logits: &[f32], out: &mut [f32]) {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for (y, x) in out.iter_mut().zip(logits) {
        *y = (x - top).exp();
        sum += *y;
    }
    out.iter_mut().for_each(|y| *y /= sum);
}

/// Puts experts outside of the best groups out of reach.
fn close_groups(limit: GroupLimit, order: &mut [f32]) {
    let size = order.len() / limit.groups;
    let mut scores = [f32::NEG_INFINITY; MAX_EXPERTS];
    let scores = &mut scores[..limit.groups];
    for (score, group) in scores.iter_mut().zip(order.chunks_exact(size)) {
        let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        for x in group {
            if *x > first {
                (first, second) = (*x, first);
            } else if *x > second {
                second = *x;
            }
        }
        *score = match limit.score {
            GroupScore::Max => first,
            GroupScore::SumTop2 if size > 1 => first + second,
            GroupScore::SumTop2 => first,
        };
    }
    let mut open = [false; MAX_EXPERTS];
    for _ in 0..limit.chosen {
        let best = highest_closed(scores, &open);
        open[best] = true;
    }
    for (group, open) in order.chunks_exact_mut(size).zip(open) {
        if !open {
            group.fill(f32::NEG_INFINITY);
        }
    }
}

/// The first of the highest values; NaN is never higher, so a row of NaN gives its first.
fn highest(values: &[f32]) -> usize {
    let mut best = 0;
    for (i, value) in values.iter().enumerate() {
        if *value > values[best] || (values[best].is_nan() && !value.is_nan()) {
            best = i;
        }
    }
    best
}

fn highest_closed(values: &[f32], open: &[bool]) -> usize {
    let mut best: Option<usize> = None;
    for (i, value) in values.iter().enumerate() {
        if !open[i] && best.is_none_or(|b| *value > values[b]) {
            best = Some(i);
        }
    }
    best.unwrap_or(0)
}
