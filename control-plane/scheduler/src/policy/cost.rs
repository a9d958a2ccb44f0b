//! How long a step takes, learnt from the steps that ran.
//!
//! `ns = base + decode * slots + prefill * prompt tokens + context * tokens attended to`, fitted by
//! least squares in which old steps fade, held near the prior by a small ridge so that features
//! that never vary stay finite. Never asks a clock: timings are arguments.
//! Invariant: a prediction is finite and not below zero, and grows with every feature.

use core::time::Duration;

/// What a step does, in the units of the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Slots that decode.
    pub decode: u32,
    /// Prompt tokens.
    pub prefill: u32,
    /// Tokens of context that the decoding slots attend to, summed.
    pub context: u64,
}

const FEATURES: usize = 4;
/// Features are divided by these so that their weights have one order of magnitude.
const SCALE: [f64; FEATURES] = [1.0, 64.0, 512.0, 65_536.0];
/// Weight that a step keeps when the next is observed: about the last hundred steps count.
const FADE: f64 = 0.99;
/// Strength of the prior, as a fraction of one observation.
const RIDGE: f64 = 1e-3;
/// Observations before predictions bind a plan; compilation and first use distort the first ones.
const TRUSTED_AFTER: u32 = 16;

/// The fitted model.
#[derive(Clone, Debug)]
pub struct CostModel {
    gram: [[f64; FEATURES]; FEATURES],
    moment: [f64; FEATURES],
    weights: [f64; FEATURES],
    seen: u32,
}

impl Default for CostModel {
    fn default() -> Self {
        Self {
            gram: [[0.0; FEATURES]; FEATURES],
            moment: [0.0; FEATURES],
            weights: [0.0; FEATURES],
            seen: 0,
        }
    }
}

impl CostModel {
    /// Learns from one step.
    pub fn observe(&mut self, load: Load, took: Duration) {
        let x = features(load);
        let y = took.as_secs_f64() * 1e9;
        for i in 0..FEATURES {
            for j in 0..FEATURES {
                self.gram[i][j] = self.gram[i][j] * FADE + x[i] * x[j];
            }
            self.moment[i] = self.moment[i] * FADE + x[i] * y;
        }
        self.seen = self.seen.saturating_add(1);
        self.weights = solve(self.gram, self.moment).map(|w| w.max(0.0));
    }

    /// How long a step with this load takes; `None` until enough steps were seen.
    #[must_use]
    pub fn predict(&self, load: Load) -> Option<Duration> {
        if self.seen < TRUSTED_AFTER {
            return None;
        }
        let ns: f64 = features(load).iter().zip(self.weights).map(|(x, w)| x * w).sum();
        // The conversion saturates.
        Some(Duration::from_nanos(ns as u64))
    }

    /// What so many more prompt tokens add to steps.
    #[must_use]
    pub fn prefill_time(&self, tokens: u32) -> Duration {
        if self.seen < TRUSTED_AFTER {
            return Duration::ZERO;
        }
        Duration::from_nanos((self.weights[2] / SCALE[2] * f64::from(tokens)) as u64)
    }

    /// Prompt tokens that fit beside `load` within `budget`; `None` while nothing is known.
    #[must_use]
    pub fn prefill_room(&self, load: Load, budget: Duration) -> Option<u32> {
        let alone = self.predict(load)?;
        let left = budget.saturating_sub(alone).as_secs_f64() * 1e9;
        let per_token = self.weights[2] / SCALE[2];
        if per_token <= 0.0 {
            return None;
        }
        Some((left / per_token) as u32)
    }
}

fn features(load: Load) -> [f64; FEATURES] {
    let raw = [1.0, f64::from(load.decode), f64::from(load.prefill), load.context as f64];
    core::array::from_fn(|i| raw[i] / SCALE[i])
}

/// Gauss elimination with partial pivoting of `(gram + ridge) w = moment`.
fn solve(mut a: [[f64; FEATURES]; FEATURES], mut b: [f64; FEATURES]) -> [f64; FEATURES] {
    for (i, row) in a.iter_mut().enumerate() {
        row[i] += RIDGE;
    }
    for col in 0..FEATURES {
        let larger = |x: &usize, y: &usize| a[*x][col].abs().total_cmp(&a[*y][col].abs());
        let pivot = (col..FEATURES).max_by(larger).unwrap_or(col);
        a.swap(col, pivot);
        b.swap(col, pivot);
        let (pivot, moment) = (a[col], b[col]);
        for row in col + 1..FEATURES {
            let factor = a[row][col] / pivot[col];
            for (x, p) in a[row].iter_mut().zip(pivot) {
                *x -= factor * p;
            }
            b[row] -= factor * moment;
        }
    }
    let mut w = [0.0; FEATURES];
    for row in (0..FEATURES).rev() {
        let known: f64 = (row + 1..FEATURES).map(|k| a[row][k] * w[k]).sum();
        let value = (b[row] - known) / a[row][row];
        w[row] = if value.is_finite() { value } else { 0.0 };
    }
    w
}

#[cfg(test)]
mod tests {
    use super::*;

    fn truth(load: Load) -> Duration {
        let ns = 2_000_000
            + 10_000 * u64::from(load.decode)
            + 3_000 * u64::from(load.prefill)
            + load.context / 2;
        Duration::from_nanos(ns)
    }

    fn trained() -> CostModel {
        let mut model = CostModel::default();
        for i in 0..200_u32 {
            let load = Load {
                decode: i * 7 % 64,
                prefill: i * 31 % 512,
                context: u64::from(i * 997 % 50_000),
            };
            model.observe(load, truth(load));
        }
        model
    }

    #[test]
    fn it_finds_the_law_behind_the_steps() {
        let model = trained();
        for (decode, prefill, context) in [(1, 0, 100), (64, 512, 50_000), (10, 2048, 0)] {
            let load = Load { decode, prefill, context };
            let (guess, real) = (model.predict(load).expect("trusted"), truth(load));
            let error = guess.abs_diff(real).as_secs_f64() / real.as_secs_f64();
            assert!(error < 0.01, "{load:?}: {guess:?} for {real:?}");
        }
        let room = model.prefill_room(Load::default(), Duration::from_millis(5)).expect("known");
        assert!((980..=1010).contains(&room), "{room}");
    }

    #[test]
    fn it_says_nothing_before_it_has_seen_enough_and_stays_finite_without_variation() {
        let mut model = CostModel::default();
        assert_eq!(model.predict(Load::default()), None);
        for _ in 0..50 {
            model.observe(Load { decode: 1, ..Load::default() }, Duration::from_millis(1));
        }
        let guess = model.predict(Load { decode: 1, ..Load::default() }).expect("trusted");
        assert!(guess.abs_diff(Duration::from_millis(1)) < Duration::from_micros(20), "{guess:?}");
        assert_eq!(model.prefill_room(Load::default(), Duration::from_millis(9)), None);
    }
}
