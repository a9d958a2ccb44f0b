//! What can be expected of the next minute: how long a request will take from its seat to its end,
//! and how long the queue will last.
//!
//! Both are learnt from what happened and given as data; time is an argument. It decides nothing.
//! Invariant: before enough was seen there is no forecast, so that nobody is refused for a guess.

use core::time::Duration;
use ids::{Timestamp, Tokens};

/// Weight of the newest observation.
const NEWEST: f64 = 1.0 / 32.0;
/// Observations before a mean is a forecast.
const TRUSTED_AFTER: u32 = 16;
/// Admissions are counted over at least this long.
const WINDOW: Duration = Duration::from_millis(500);

/// A fading mean.
#[derive(Clone, Copy, Debug, Default)]
struct Mean {
    value: f64,
    seen: u32,
}

impl Mean {
    fn observe(&mut self, value: f64) {
        self.seen = self.seen.saturating_add(1);
        // The first few count equally.
        let weight = NEWEST.max(1.0 / f64::from(self.seen));
        self.value += weight * (value - self.value);
    }

    fn get(self) -> Option<f64> {
        (self.seen >= TRUSTED_AFTER).then_some(self.value)
    }
}

/// The forecast.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Outlook {
    /// ns of a step.
    step: Mean,
    /// Tokens of an output that ended by itself, and their squares.
    output: Mean,
    squares: Mean,
    /// Prompt tokens admitted per ns while others waited.
    admitted: Mean,
    since: Option<Timestamp>,
    tokens: u64,
}

impl Outlook {
    /// A step ran.
    pub(crate) fn step(&mut self, took: Duration) {
        self.step.observe(took.as_secs_f64() * 1e9);
    }

    /// A request ended by itself.
    pub(crate) fn ended(&mut self, output: Tokens) {
        self.output.observe(f64::from(output.0));
        self.squares.observe(f64::from(output.0).powi(2));
    }

    /// A request was cut off; what it would have become was no less.
    pub(crate) fn cut(&mut self, output: Tokens) {
        if self.output.get().is_some_and(|mean| f64::from(output.0) > mean) {
            self.ended(output);
        }
    }

    /// Prompt tokens left the queue; `waiting` says whether others remain.
    pub(crate) fn admitted(&mut self, now: Timestamp, prompt: Tokens, waiting: bool) {
        if !waiting {
            (self.since, self.tokens) = (None, 0);
            return;
        }
        let since = *self.since.get_or_insert(now);
        let took = now.since(since);
        if took >= WINDOW {
            self.admitted.seen = TRUSTED_AFTER;
            let rate = self.tokens as f64 / (took.as_secs_f64() * 1e9);
            let known = if self.admitted.value > 0.0 { self.admitted.value } else { rate };
            self.admitted.value = (known + rate) / 2.0;
            self.since = Some(now);
            self.tokens = 0;
        }
        self.tokens += u64::from(prompt.0);
    }

    /// Tokens that an output is likely to have, of at most `most`: the mean.
    pub(crate) fn likely_output(&self, least: Tokens, most: Tokens) -> Tokens {
        let usual = self.output.get().map_or(least.0, |mean| mean as u32);
        Tokens(usual.max(least.0).min(most.0))
    }

    /// Tokens that few outputs exceed: two deviations above the mean.
    pub(crate) fn large_output(&self, least: Tokens, most: Tokens) -> Tokens {
        let (Some(mean), Some(squares)) = (self.output.get(), self.squares.get()) else {
            return least;
        };
        let deviation = (squares - mean * mean).max(0.0).sqrt();
        Tokens(((mean + 2.0 * deviation) as u32).max(least.0).min(most.0))
    }

    /// How long `output` tokens take: one step each.
    pub(crate) fn decode_time(&self, output: Tokens) -> Option<Duration> {
        let ns = self.step.get()? * f64::from(output.0);
        Some(Duration::from_nanos(ns as u64))
    }

    /// How long a queue of so many prompt tokens lasts.
    pub(crate) fn drain_time(&self, tokens: u64) -> Option<Duration> {
        let rate = self.admitted.get().filter(|rate| *rate > 0.0)?;
        Some(Duration::from_nanos((tokens as f64 / rate) as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_forecasts_what_it_saw_and_nothing_before() {
        let mut outlook = Outlook::default();
        assert_eq!(outlook.decode_time(Tokens(10)), None);
        assert_eq!(outlook.drain_time(100), None);
        assert_eq!(outlook.likely_output(Tokens(1), Tokens(500)), Tokens(1), "nothing is known");
        assert_eq!(outlook.large_output(Tokens(1), Tokens(500)), Tokens(1));
        for i in 0..100 {
            outlook.step(Duration::from_millis(5));
            outlook.ended(Tokens(40));
            outlook.admitted(Timestamp(i * 100_000_000), Tokens(1000), true);
        }
        assert_eq!(outlook.decode_time(Tokens(10)), Some(Duration::from_millis(50)));
        assert_eq!(outlook.likely_output(Tokens(1), Tokens(500)), Tokens(40));
        assert_eq!(outlook.likely_output(Tokens(1), Tokens(30)), Tokens(30));
        assert_eq!(outlook.likely_output(Tokens(60), Tokens(500)), Tokens(60));
        assert_eq!(outlook.large_output(Tokens(1), Tokens(500)), Tokens(40), "all are alike");
        (0..1000).for_each(|i| outlook.ended(Tokens(i % 2 * 40 + 20)));
        let large = outlook.large_output(Tokens(1), Tokens(500));
        assert!((76..=84).contains(&large.0), "forty and twice twenty: {large}");
        outlook.cut(Tokens(10));
        assert_eq!(outlook.large_output(Tokens(1), Tokens(500)), large, "it was cut short");
        let drain = outlook.drain_time(50_000).expect("seen");
        assert!(drain.abs_diff(Duration::from_secs(5)) < Duration::from_millis(100), "{drain:?}");
    }
}
