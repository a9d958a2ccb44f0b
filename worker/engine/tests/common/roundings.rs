//! How far bf16 may be from exact arithmetic, from the roundings that there are.
//!
//! With `n` roundings, each off by at most `UNIT` and independent, hidden states are off by about
//! `UNIT sqrt(n)` of their size, and logits by that part of their spread: one standard deviation of
//! what follows. A router whose choice is close to a tie may choose otherwise, which no rounding
//! bounds; how many tokens that happens to is bounded instead.

use super::naive;
use model::config::ModelConfig;
use weights::Weights;

/// Roundings of a token's residual stream that do not follow from each other: per layer those of two
/// norms, the projections, rotation, attention's queries, weights, sums and result, two activations
/// and two additions; at the ends embedding and norm.
const ROUNDINGS: (usize, usize) = (14, 3);
/// bf16 keeps 8 bits: half a unit in the last place is at most this part of a number.
const UNIT: f64 = 1.0 / 512.0;
/// Share of tokens that take another expert than they would exactly. A gap between the last score
/// chosen and the first one not chosen is about exponential, with `experts * density at the border`
/// (12 * 0.32) scores to a standard deviation; the noise of a difference of scores, sqrt(2) * 0.012 of
/// it, closes one in 40; of two layers one token in 20 is hit.
pub const OTHERWISE: f64 = 0.06;

/// One standard deviation of what follows from hidden states, as part of its spread.
fn part(config: &ModelConfig) -> f64 {
    let roundings = (ROUNDINGS.0 * config.decoder().layers + ROUNDINGS.1) as f64;
    // Matrices are rounded too, which counts as much again.
    UNIT * (2.0 * roundings).sqrt()
}

/// One standard deviation of a model's log-probabilities in bf16.
#[derive(Clone, Copy, Debug)]
pub struct Roundings {
    pub typical: f64,
    /// Whether tokens choose experts.
    pub routed: bool,
}

impl Roundings {
    pub fn of(config: &ModelConfig, weights: &Weights, tokens: &[u32]) -> Self {
        let expected = naive::logprobs(config, weights, tokens);
        let row = expected.last().expect("a token");
        let mean = row.iter().sum::<f64>() / row.len() as f64;
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / row.len() as f64;
        Self { typical: part(config) * variance.sqrt(), routed: Self::is_routed(config) }
    }

    /// Part of their spread by which a router's scores may be off for two computations in bf16 to choose
    /// differently: four and a half standard deviations, of a difference of two scores, each computed twice.
    pub fn of_scores(config: &ModelConfig) -> f64 {
        4.5 * 2.0 * part(config)
    }

    /// Whether tokens of a model choose experts.
    pub const fn is_routed(config: &ModelConfig) -> bool {
        matches!(config, ModelConfig::Qwen3Moe(_) | ModelConfig::DeepSeek(_))
    }

    /// Of the difference of two computations in bf16.
    pub fn twice(self) -> Self {
        Self { typical: self.typical * 2.0_f64.sqrt(), ..self }
    }

    /// Whether differences can be roundings; says what they are.
    pub fn explain(&self, mut off: Vec<f64>, what: &str) {
        let Self { typical, routed } = *self;
        assert!(!off.is_empty() && off.iter().all(|off| off.is_finite()), "{what}: {off:?}");
        off.sort_by(f64::total_cmp);
        let at = |share: f64| off[((off.len() - 1) as f64 * share) as usize];
        let (median, most, worst) = (at(0.5), at(0.9), at(1.0));
        let figures = format!(
            "{what}: median {median:.4}, 90 % within {most:.4}, worst {worst:.4}, typical {typical:.4}"
        );
        super::say(&figures);
        // Of a normal distribution half are within 0.67 standard deviations.
        assert!(median <= typical, "{figures}");
        // 90 % are within 1.64; with as many routed otherwise as there may be, those within 2.0 of the
        // others make up 90 %, and attention hands on as much noise again.
        let bound = if routed { 2.0 * 2.0_f64.sqrt() } else { 2.0 };
        assert!(most <= bound * typical, "{figures}");
        // Four and a half over some thousands of draws.
        assert!(routed || worst <= 4.5 * typical, "{figures}");
    }

    /// Whether likeliest tokens agree where the reference's margin is clear: `(margin, agrees)` each.
    pub fn agree(&self, tops: &[(f64, bool)], what: &str) {
        // Both of two log-probabilities are off.
        let clear = 4.5 * self.typical * 2.0_f64.sqrt();
        let clear: Vec<bool> =
            tops.iter().filter(|(margin, _)| *margin > clear).map(|top| top.1).collect();
        let same = clear.iter().filter(|same| **same).count();
        let (all, clear) = (tops.len(), clear.len());
        super::say(&format!("{what}: {same} of {clear} clear tokens agree, {all} in all"));
        let least = if self.routed { clear as f64 * (1.0 - OTHERWISE) } else { clear as f64 };
        assert!(same as f64 >= least.floor(), "{what}: {same} of {clear} clear tokens agree");
    }
}
