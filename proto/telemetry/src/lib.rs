//! The catalogue of metrics: every name, unit and label value in one place.
//!
//! Names are `tokenmill_<what>_<unit>[_total]` in base units; the gauges and counters that routers
//! and dashboards of the field query are also exported under their `vllm:` names. Nothing here
//! observes by itself. Invariant: label values are enums of this crate, never text from outside, so
//! the number of series is bounded.

use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts,
    Registry, TextEncoder,
};

/// Seconds from a microsecond to minutes.
const SECONDS: [f64; 16] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
];

/// Doors of the gateway, as a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// `/v1/completions`
    Completions,
    /// `/v1/chat/completions`
    Chat,
    /// Everything else.
    Other,
}

impl Route {
    const fn label(self) -> &'static str {
        match self {
            Self::Completions => "completions",
            Self::Chat => "chat",
            Self::Other => "other",
        }
    }
}

/// How a generation ended, as a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// End token, stop token or stop string.
    Stop,
    /// `max_tokens`.
    Length,
    /// The client left.
    Abort,
    /// Anything else.
    Error,
}

impl Ending {
    const fn label(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
            Self::Error => "error",
        }
    }
}

/// Every metric of the control plane, registered in one registry.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Registry,
    responses: IntCounterVec,
    finished: IntCounterVec,
    finished_compat: IntCounterVec,
    /// Requests waiting for a slot.
    pub waiting: IntGauge,
    waiting_compat: IntGauge,
    /// Requests with a slot.
    pub running: IntGauge,
    running_compat: IntGauge,
    cache_use: Gauge,
    cache_use_compat: Gauge,
    /// KV blocks by what holds them.
    blocks: GaugeVec,
    /// Prompt tokens of accepted requests.
    pub prompt_tokens: IntCounter,
    /// Tokens generated and kept.
    pub generation_tokens: IntCounter,
    /// Prompt tokens found in the prefix cache.
    pub prefix_hit_tokens: IntCounter,
    /// Preemptions.
    pub preemptions: IntCounter,
    /// Worker processes that died.
    pub worker_deaths: IntCounter,
    /// Clients that left before their answer was whole.
    pub disconnects: IntCounter,
    /// From a request's arrival to its first token.
    pub time_to_first_token: Histogram,
    /// Between two tokens of a request.
    pub inter_token: Histogram,
    /// From a request's arrival to its end.
    pub end_to_end: Histogram,
    /// From taking a plan to its outcome, on the worker.
    pub step: Histogram,
    /// Planning of one step.
    pub plan: Histogram,
}

impl Metrics {
    /// A fresh set.
    ///
    /// # Panics
    /// Never: names are distinct and well formed, which a test builds this to check.
    #[must_use]
    pub fn new() -> Self {
        let r = Registry::new();
        let deaths = counter(&r, "tokenmill_worker_deaths_total", "Worker processes that died.");
        Self {
            responses: labelled(
                &r,
                "tokenmill_http_responses_total",
                "HTTP responses.",
                &["route", "status"],
            ),
            finished: labelled(
                &r,
                "tokenmill_requests_finished_total",
                "Generations by ending.",
                &["reason"],
            ),
            finished_compat: labelled(
                &r,
                "vllm:request_success_total",
                "Generations by ending.",
                &["finished_reason"],
            ),
            waiting: gauge(&r, "tokenmill_requests_waiting", "Requests waiting for a slot."),
            waiting_compat: gauge(&r, "vllm:num_requests_waiting", "Requests waiting for a slot."),
            running: gauge(&r, "tokenmill_requests_running", "Requests with a slot."),
            running_compat: gauge(&r, "vllm:num_requests_running", "Requests with a slot."),
            cache_use: share(&r, "tokenmill_kv_cache_usage_ratio", "KV blocks in use, of all."),
            cache_use_compat: share(
                &r,
                "vllm:kv_cache_usage_perc",
                "KV blocks in use, of all; 1 is full.",
            ),
            blocks: {
                let opts = Opts::new("tokenmill_kv_blocks", "KV blocks by what holds them.");
                register(&r, GaugeVec::new(opts, &["state"]).expect("a well-formed metric"))
            },
            prompt_tokens: counter(
                &r,
                "tokenmill_prompt_tokens_total",
                "Prompt tokens of accepted requests.",
            ),
            generation_tokens: counter(
                &r,
                "tokenmill_generation_tokens_total",
                "Tokens generated and kept.",
            ),
            prefix_hit_tokens: counter(
                &r,
                "tokenmill_prefix_hit_tokens_total",
                "Prompt tokens found in the prefix cache.",
            ),
            preemptions: counter(&r, "tokenmill_preemptions_total", "Requests preempted."),
            worker_deaths: deaths,
            disconnects: counter(
                &r,
                "tokenmill_client_disconnects_total",
                "Clients that left early.",
            ),
            time_to_first_token: seconds(
                &r,
                "tokenmill_time_to_first_token_seconds",
                "Arrival to first token.",
            ),
            inter_token: seconds(
                &r,
                "tokenmill_inter_token_latency_seconds",
                "Between two tokens of a request.",
            ),
            end_to_end: seconds(
                &r,
                "tokenmill_request_duration_seconds",
                "Arrival to end of a request.",
            ),
            step: seconds(&r, "tokenmill_step_duration_seconds", "A step on the worker."),
            plan: {
                let buckets = [1e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 1e-2];
                let opts =
                    HistogramOpts::new("tokenmill_plan_duration_seconds", "Planning of one step.");
                register(
                    &r,
                    Histogram::with_opts(opts.buckets(buckets.to_vec()))
                        .expect("a well-formed metric"),
                )
            },
            registry: r,
        }
    }

    /// Counts a response; statuses are counted by their class.
    pub fn response(&self, route: Route, status: u16) {
        let class = match status {
            200..300 => "2xx",
            400..500 => "4xx",
            500..600 => "5xx",
            _ => "other",
        };
        self.responses.with_label_values(&[route.label(), class]).inc();
    }

    /// Counts a generation's end.
    pub fn finished(&self, ending: Ending) {
        self.finished.with_label_values(&[ending.label()]).inc();
        self.finished_compat.with_label_values(&[ending.label()]).inc();
    }

    /// Sets what the scheduler reports of itself.
    pub fn scheduler(&self, waiting: u64, running: u64) {
        for (gauge, value) in [
            (&self.waiting, waiting),
            (&self.waiting_compat, waiting),
            (&self.running, running),
            (&self.running_compat, running),
        ] {
            gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        }
    }

    /// Sets the state of the KV cache, in blocks: in use, cached for reuse, waiting for launched
    /// steps, and all there are.
    pub fn cache(&self, used: u64, cached: u64, limbo: u64, total: u64) {
        let share = if total == 0 { 0.0 } else { used as f64 / total as f64 };
        self.cache_use.set(share);
        self.cache_use_compat.set(share);
        let free = total.saturating_sub(used + cached + limbo);
        for (state, value) in
            [("used", used), ("cached", cached), ("limbo", limbo), ("free", free), ("total", total)]
        {
            self.blocks.with_label_values(&[state]).set(value as f64);
        }
    }

    /// Everything in the Prometheus text format.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = Vec::new();
        // Writing to memory cannot fail, and names are ASCII.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        String::from_utf8(text).unwrap_or_default()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

fn register<M: prometheus::core::Collector + Clone + 'static>(registry: &Registry, metric: M) -> M {
    registry.register(Box::new(metric.clone())).expect("names are distinct");
    metric
}

fn counter(registry: &Registry, name: &str, help: &str) -> IntCounter {
    register(registry, IntCounter::new(name, help).expect("a well-formed metric"))
}

fn gauge(registry: &Registry, name: &str, help: &str) -> IntGauge {
    register(registry, IntGauge::new(name, help).expect("a well-formed metric"))
}

fn share(registry: &Registry, name: &str, help: &str) -> Gauge {
    register(registry, Gauge::new(name, help).expect("a well-formed metric"))
}

fn labelled(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    let metric = IntCounterVec::new(Opts::new(name, help), labels).expect("a well-formed metric");
    register(registry, metric)
}

fn seconds(registry: &Registry, name: &str, help: &str) -> Histogram {
    let opts = HistogramOpts::new(name, help).buckets(SECONDS.to_vec());
    register(registry, Histogram::with_opts(opts).expect("a well-formed metric"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_registered_and_series_are_bounded() {
        let metrics = Metrics::new();
        for status in 0..=u16::MAX {
            metrics.response(Route::Other, status);
        }
        metrics.finished(Ending::Length);
        metrics.scheduler(3, 4);
        metrics.cache(1, 2, 3, 10);
        let text = metrics.render();
        assert!(text.contains("tokenmill_requests_waiting 3"));
        assert!(text.contains("vllm:num_requests_running 4"));
        assert!(text.contains("tokenmill_kv_blocks{state=\"free\"} 4"));
        let series =
            text.lines().filter(|l| l.starts_with("tokenmill_http_responses_total")).count();
        assert_eq!(series, 4);
    }
}
