//! What a server's own metrics say of a load: the difference of two scrapes of `/metrics`.
//!
//! A server that has none, or others, is measured all the same, from outside alone. Invariant: a figure
//! is of what happened between the two scrapes.

use load::Client;
use serde_json::{Value, json};
use std::fmt;

/// Decode steps of a size are worth a line from this share of all of them.
const SHARE: f64 = 0.05;

/// Every series and its value at one moment.
pub(super) struct Scrape(Vec<(String, f64)>);

impl Scrape {
    /// Nothing where the server has no metrics of ours.
    pub(super) async fn of(client: &Client) -> Option<Self> {
        let text = client.text("/metrics").await.ok()?;
        let scrape = Self::parse(&text);
        scrape.0.iter().any(|(series, _)| series.starts_with("tokenmill_")).then_some(scrape)
    }

    fn parse(text: &str) -> Self {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let series = lines.filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            Some((series.to_owned(), value.parse().ok()?))
        });
        Self(series.collect())
    }

    /// Series of a metric with what grew since `before`.
    fn grown<'a>(
        &'a self,
        before: &'a Self,
        metric: &'a str,
    ) -> impl Iterator<Item = (&'a str, f64)> {
        self.0.iter().filter_map(move |(series, value)| {
            let labels = series.strip_prefix(metric)?;
            if !labels.is_empty() && !labels.starts_with('{') {
                return None;
            }
            let was = before.0.iter().find(|(name, _)| name == series).map_or(0.0, |(_, v)| *v);
            Some((labels, value - was))
        })
    }

    fn sum(&self, before: &Self, metric: &str) -> f64 {
        self.grown(before, metric).map(|(_, grown)| grown).sum()
    }
}

/// The value of a label in `{name="value",...}`.
fn label<'a>(labels: &'a str, name: &str) -> Option<&'a str> {
    let parts = labels.trim_matches(['{', '}']).split(',');
    parts
        .filter_map(|part| part.split_once('='))
        .find_map(|(key, value)| (key == name).then(|| value.trim_matches('"')))
}

/// What happened at the server during a load.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Server {
    /// Share of the time in which the device ran nothing between steps though there was work.
    idle: Option<f64>,
    /// Seconds of the 99th of a hundred of the scheduler's turns until their plans had left, at most.
    planner_p99: Option<f64>,
    /// The same of handing on what a turn gave.
    deliver_p99: Option<f64>,
    launches_per_step: Option<f64>,
    /// Tokens of decode steps, rounded up to a power of two; how many steps; mean seconds.
    decode: Vec<(u32, f64, f64)>,
}

impl Server {
    pub(super) fn between(before: &Scrape, after: &Scrape) -> Self {
        let ratio = |part: f64, of: f64| (of > 0.0).then(|| part / of);
        let sum = |metric: &str| after.sum(before, metric);
        let (idle, busy) = (
            sum("tokenmill_worker_idle_seconds_total"),
            sum("tokenmill_worker_busy_seconds_total"),
        );
        let steps = sum("tokenmill_step_seconds_count");
        let mut decode: Vec<(u32, f64, f64)> = Vec::new();
        for (labels, count) in after.grown(before, "tokenmill_worker_step_seconds_count") {
            let sums = after.grown(before, "tokenmill_worker_step_seconds_sum");
            let seconds = sums.filter(|(of, _)| *of == labels).map(|(_, seconds)| seconds).sum();
            let tokens = label(labels, "tokens").and_then(|tokens| tokens.parse().ok());
            if label(labels, "kind") == Some("decode")
                && count > 0.0
                && let (Some(tokens), Some(mean)) = (tokens, ratio(seconds, count))
            {
                decode.push((tokens, count, mean));
            }
        }
        decode.sort_by_key(|(tokens, ..)| *tokens);
        let all: f64 = decode.iter().map(|(_, count, _)| count).sum();
        decode.retain(|(_, count, _)| *count >= SHARE * all);
        Self {
            idle: ratio(idle, idle + busy),
            planner_p99: quantile(after.grown(before, "tokenmill_planner_seconds_bucket"), 0.99),
            deliver_p99: quantile(after.grown(before, "tokenmill_deliver_seconds_bucket"), 0.99),
            launches_per_step: ratio(sum("tokenmill_worker_launches_total"), steps),
            decode,
        }
    }

    /// As part of a recorded line.
    pub(super) fn value(&self) -> Value {
        let rounded = |x: f64| (x * 1e4).round() / 1e4;
        let step = |(tokens, steps, mean): &(u32, f64, f64)| json!({"tokens": tokens, "steps": steps, "mean_ms": rounded(1e3 * mean)});
        json!({
            "device_idle_percent": self.idle.map(|idle| rounded(100.0 * idle)),
            "planner_p99_us": self.planner_p99.map(|seconds| rounded(1e6 * seconds)),
            "deliver_p99_us": self.deliver_p99.map(|seconds| rounded(1e6 * seconds)),
            "launches_per_step": self.launches_per_step.map(rounded),
            "decode_steps": self.decode.iter().map(step).collect::<Vec<_>>(),
        })
    }
}

/// A quantile of a histogram's cumulative buckets, linear inside of a bucket as Prometheus has it.
fn quantile<'a>(buckets: impl Iterator<Item = (&'a str, f64)>, share: f64) -> Option<f64> {
    let bound = |labels| label(labels, "le")?.parse::<f64>().ok();
    let mut buckets: Vec<(f64, f64)> =
        buckets.filter_map(|(labels, count)| Some((bound(labels)?, count))).collect();
    buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
    let all = buckets.last()?.1;
    let rank = share * all;
    let mut below = (0.0, 0.0);
    for (bound, count) in buckets {
        if count >= rank && count > 0.0 {
            let inside = (rank - below.1) / (count - below.1);
            // The last bucket has no end.
            return Some(if bound.is_finite() {
                below.0 + inside * (bound - below.0)
            } else {
                below.0
            });
        }
        below = (bound, count);
    }
    None
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut told = Vec::new();
        told.extend(self.idle.map(|idle| format!("device idle {:.2} %", 100.0 * idle)));
        for (what, p99) in [("planner", self.planner_p99), ("deliver", self.deliver_p99)] {
            told.extend(p99.map(|seconds| format!("{what} p99 {:.0} us", 1e6 * seconds)));
        }
        told.extend(self.launches_per_step.map(|n| format!("{n:.1} launches a step")));
        if !told.is_empty() {
            writeln!(f, "server        {}", told.join(", "))?;
        }
        for (tokens, steps, mean) in &self.decode {
            writeln!(
                f,
                "decode step   up to {tokens} tokens: {:.3} ms ({steps} steps)",
                1e3 * mean
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = "# HELP x y\n\
        tokenmill_worker_idle_seconds_total{model_name=\"m\"} 1\n\
        tokenmill_worker_busy_seconds_total{model_name=\"m\"} 10\n\
        tokenmill_worker_step_seconds_sum{kind=\"decode\",model_name=\"m\",tokens=\"16\"} 1\n\
        tokenmill_worker_step_seconds_count{kind=\"decode\",model_name=\"m\",tokens=\"16\"} 100\n";
    const AFTER: &str = "tokenmill_worker_idle_seconds_total{model_name=\"m\"} 2\n\
        tokenmill_worker_busy_seconds_total{model_name=\"m\"} 109\n\
        tokenmill_worker_launches_total{model_name=\"m\"} 600\n\
        tokenmill_step_seconds_count{model_name=\"m\"} 200\n\
        tokenmill_worker_step_seconds_sum{kind=\"decode\",model_name=\"m\",tokens=\"16\"} 2\n\
        tokenmill_worker_step_seconds_count{kind=\"decode\",model_name=\"m\",tokens=\"16\"} 300\n\
        tokenmill_worker_step_seconds_count{kind=\"mixed\",model_name=\"m\",tokens=\"16\"} 7\n\
        tokenmill_planner_seconds_bucket{model_name=\"m\",le=\"0.0001\"} 98\n\
        tokenmill_planner_seconds_bucket{model_name=\"m\",le=\"0.0002\"} 100\n\
        tokenmill_planner_seconds_bucket{model_name=\"m\",le=\"+Inf\"} 100\n";

    #[test]
    fn figures_are_of_what_grew() {
        let server = Server::between(&Scrape::parse(BEFORE), &Scrape::parse(AFTER));
        let near = |got: Option<f64>, to: f64| got.is_some_and(|got| (got - to).abs() < 1e-9);
        assert!(near(server.idle, 0.01), "{server:?}");
        assert!(near(server.planner_p99, 0.00015), "{server:?}");
        assert!(near(server.launches_per_step, 3.0), "{server:?}");
        assert_eq!(server.decode, [(16, 200.0, 0.005)]);
        let told = server.to_string();
        assert!(told.contains("idle 1.00 %") && told.contains("5.000 ms (200 steps)"), "{told}");
        assert_eq!(server.value()["decode_steps"][0]["mean_ms"], 5.0);
    }

    #[test]
    fn nothing_grown_is_nothing_said() {
        let server = Server::between(&Scrape::parse(AFTER), &Scrape::parse(AFTER));
        assert_eq!(server.to_string(), "");
    }
}
