//! What a load amounted to, in the words the field uses: TTFT, TPOT, ITL, E2E.

use crate::{ClientError, Timeline, percentile};
use serde::Serialize;
use std::fmt;
use std::time::Duration;

/// Figures of one load. Times in milliseconds.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Requests whose stream ended as it should.
    pub completed: usize,
    /// Requests that did not.
    pub failed: usize,
    /// The first failure's text.
    pub first_failure: Option<String>,
    /// From the first request sent to the last stream ended, in seconds.
    pub duration_s: f64,
    /// Completed requests per second.
    pub requests_per_s: f64,
    /// Generated tokens per second, completed requests only.
    pub output_tokens_per_s: f64,
    /// Prompt and generated tokens per second, completed requests only.
    pub total_tokens_per_s: f64,
    /// Time to first token.
    pub ttft_ms: Percentiles,
    /// Time per output token after the first, averaged within each request.
    pub tpot_ms: Percentiles,
    /// Every gap between two tokens.
    pub itl_ms: Percentiles,
    /// From sending to the end.
    pub e2e_ms: Percentiles,
}

/// A distribution.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Percentiles {
    /// Arithmetic mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
}

impl Percentiles {
    fn of(mut values: Vec<f64>) -> Self {
        if values.is_empty() {
            return Self::default();
        }
        values.sort_by(f64::total_cmp);
        Self {
            mean: values.iter().sum::<f64>() / values.len() as f64,
            p50: percentile(&values, 50.0),
            p90: percentile(&values, 90.0),
            p99: percentile(&values, 99.0),
        }
    }
}

fn ms(duration: &Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

impl Report {
    /// Sums up `results` of requests with `input` prompt tokens each.
    #[must_use]
    pub fn of(results: &[Result<Timeline, ClientError>], input: u32, elapsed: Duration) -> Self {
        let done: Vec<&Timeline> = results.iter().filter_map(|r| r.as_ref().ok()).collect();
        let seconds = elapsed.as_secs_f64().max(1e-9);
        let output: usize = done.iter().map(|t| t.tokens).sum();
        let tpot = |t: &&Timeline| {
            let gaps = t.gaps.len();
            (gaps > 0).then(|| t.gaps.iter().map(ms).sum::<f64>() / gaps as f64)
        };
        Self {
            completed: done.len(),
            failed: results.len() - done.len(),
            first_failure: results.iter().find_map(|r| r.as_ref().err()).map(ToString::to_string),
            duration_s: seconds,
            requests_per_s: done.len() as f64 / seconds,
            output_tokens_per_s: output as f64 / seconds,
            total_tokens_per_s: (output + done.len() * input as usize) as f64 / seconds,
            ttft_ms: Percentiles::of(done.iter().map(|t| ms(&t.first)).collect()),
            tpot_ms: Percentiles::of(done.iter().filter_map(tpot).collect()),
            itl_ms: Percentiles::of(done.iter().flat_map(|t| t.gaps.iter().map(ms)).collect()),
            e2e_ms: Percentiles::of(done.iter().map(|t| ms(&t.total)).collect()),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "requests      {} completed, {} failed", self.completed, self.failed)?;
        if let Some(failure) = &self.first_failure {
            writeln!(f, "first failure {failure}")?;
        }
        writeln!(f, "duration      {:.2} s", self.duration_s)?;
        writeln!(
            f,
            "throughput    {:.2} requests/s, {:.1} output tokens/s, {:.1} tokens/s in all",
            self.requests_per_s, self.output_tokens_per_s, self.total_tokens_per_s
        )?;
        writeln!(f, "{:<14}{:>10}{:>10}{:>10}{:>10}", "ms", "mean", "p50", "p90", "p99")?;
        for (name, p) in [
            ("TTFT", &self.ttft_ms),
            ("TPOT", &self.tpot_ms),
            ("ITL", &self.itl_ms),
            ("E2E", &self.e2e_ms),
        ] {
            writeln!(f, "{name:<14}{:>10.2}{:>10.2}{:>10.2}{:>10.2}", p.mean, p.p50, p.p90, p.p99)?;
        }
        Ok(())
    }
}
