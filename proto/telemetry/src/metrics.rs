//! Every metric of the control plane, made once and handed around.
//!
//! Series with closed labels are made at start, so that a rate over a metric that has not happened
//! yet is zero and not absent. Under [`Metrics::render`] the ones that dashboards for vLLM query
//! can appear a second time under the names they have there.

use crate::gpu::GpuMetrics;
use crate::label::{
    BlockState, Door, FinishedBy, PlacedBy, RefusedBy, StartupPhase, StatusClass, StepKind,
    StepsAhead,
};
use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{
    Counter, Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter,
    IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};
use std::fmt;
use std::sync::OnceLock;

/// Seconds, for waits that a person feels: a millisecond to ten minutes.
const LATENCY: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
    120.0, 300.0, 600.0,
];
/// Seconds between tokens and in steps: 100 microseconds to 10 seconds.
const STEP: &[f64] = &[
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1,
    0.25, 0.5, 1.0, 2.5, 10.0,
];

/// Seconds of the scheduler's turns: 10 microseconds to a tenth of a second.
const PLANNER: &[f64] = &[
    0.00001, 0.000025, 0.00005, 0.000075, 0.0001, 0.00015, 0.0002, 0.0003, 0.0005, 0.001, 0.0025,
    0.005, 0.01, 0.1,
];

/// Our names and vLLM's, where type and meaning agree.
const VLLM_ALIASES: [(&str, &str); 12] = [
    ("tokenmill_requests_waiting", "vllm:num_requests_waiting"),
    ("tokenmill_requests_running", "vllm:num_requests_running"),
    ("tokenmill_kv_cache_usage_ratio", "vllm:kv_cache_usage_perc"),
    ("tokenmill_prompt_tokens_total", "vllm:prompt_tokens_total"),
    ("tokenmill_generated_tokens_total", "vllm:generation_tokens_total"),
    ("tokenmill_time_to_first_token_seconds", "vllm:time_to_first_token_seconds"),
    ("tokenmill_inter_token_seconds", "vllm:inter_token_latency_seconds"),
    ("tokenmill_request_seconds", "vllm:e2e_request_latency_seconds"),
    ("tokenmill_queue_seconds", "vllm:request_queue_time_seconds"),
    ("tokenmill_preemptions_total", "vllm:num_preemptions_total"),
    ("tokenmill_prefix_cache_hit_tokens_total", "vllm:prefix_cache_hits_total"),
    ("tokenmill_prefix_cache_queried_tokens_total", "vllm:prefix_cache_queries_total"),
];

/// The counter of ended generations has another label there, so it is no plain alias.
const VLLM_SUCCESS: (&str, &str) = ("tokenmill_generations_total", "vllm:request_success_total");

/// Our names and vLLM's, all of them.
pub(crate) fn aliases() -> impl Iterator<Item = (&'static str, &'static str)> {
    VLLM_ALIASES.into_iter().chain([VLLM_SUCCESS])
}

/// Brings gauges up to date before somebody reads them.
struct Sampler(Box<dyn Fn(&Metrics) + Send + Sync>);

impl fmt::Debug for Sampler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sampler")
    }
}

/// All metrics of one server.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    sampler: OnceLock<Sampler>,
    /// The device that runs the model.
    pub gpu: GpuMetrics,
    /// Requests queued and not yet running.
    pub requests_waiting: IntGauge,
    /// Requests that hold a slot.
    pub requests_running: IntGauge,
    /// KV blocks in use, 0 to 1.
    pub kv_cache_usage: Gauge,
    /// Prompt tokens of requests that were started.
    pub prompt_tokens: IntCounter,
    /// Tokens delivered.
    pub generated_tokens: IntCounter,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_cache_queried: IntCounter,
    /// Prompt tokens found there.
    pub prefix_cache_hit: IntCounter,
    /// Of those, brought back from the memory behind the KV cache.
    pub host_cache_hit: IntCounter,
    /// KV blocks in the memory behind the cache.
    pub host_cache_blocks: IntGauge,
    /// KV blocks copied there.
    pub host_cache_stores: IntCounter,
    /// KV blocks copied back.
    pub host_cache_loads: IntCounter,
    /// Times a running request gave up its blocks.
    pub preemptions: IntCounter,
    /// Times the worker group was started again.
    pub worker_restarts: IntCounter,
    /// Times the ranks of a group did not agree about a step.
    pub worker_divergences: IntCounter,
    /// From submission to the first token.
    pub time_to_first_token: Histogram,
    /// Between tokens of one generation.
    pub inter_token: Histogram,
    /// From submission to the end of a generation.
    pub request_duration: Histogram,
    /// From a request's arrival to the plan of the first step that runs it.
    pub queue_time: Histogram,
    /// Time that the worker took for a step, as it says itself.
    pub step_duration: Histogram,
    /// Turns of the scheduler in which it planned a step, until its plans had left.
    pub planner: Histogram,
    /// Handing results to their requests after that.
    pub deliver: Histogram,
    /// Launches of kernels, graphs and copies that the worker's host made.
    pub worker_launches: IntCounter,
    /// Steps whose tokens the worker's host drew, so that the next one waited for it.
    pub worker_host_draws: IntCounter,
    /// Kinds of steps that the worker has captured.
    pub worker_graphs: IntGauge,
    /// Steps that the worker launched op by op though it captures steps.
    pub worker_uncaptured: IntCounter,
    /// Time that the device ran steps.
    pub worker_busy: Counter,
    /// Time that the device ran nothing between two steps though there were requests.
    pub worker_idle: Counter,
    /// Client connections that are open.
    pub connections: IntGauge,
    /// Streams given up because the client did not read.
    pub stalled_clients: IntCounter,
    /// 1 for the state that holds, 0 else: whether requests are served.
    pub ready: IntGauge,
    startup: GaugeVec,
    kv_blocks: IntGaugeVec,
    steps_planned: IntCounterVec,
    worker_steps: HistogramVec,
    placements: IntCounterVec,
    replies: IntCounterVec,
    finished: IntCounterVec,
    refused: IntCounterVec,
    unknown_fields: IntCounterVec,
    info: IntGaugeVec,
    device: IntGaugeVec,
}

impl Metrics {
    /// Says what runs the model: `cpu` or `cuda`, and which device and why, for people.
    pub fn serves_on(&self, backend: &str, device: &str) {
        self.device.with_label_values(&[backend, device]).set(1);
    }

    /// The metrics of a server for the model of this name.
    #[must_use]
    pub fn new(model: &str, version: &str) -> Self {
        let registry = Registry::new();
        let make = Maker { registry: &registry, model };
        let metrics = Self {
            sampler: OnceLock::new(),
            gpu: GpuMetrics::new(&make),
            requests_waiting: make.gauge("requests_waiting", "Requests queued, not running."),
            requests_running: make.gauge("requests_running", "Requests that hold a slot."),
            kv_cache_usage: make.ratio("kv_cache_usage_ratio", "KV blocks in use, 0 to 1."),
            prompt_tokens: make.counter("prompt_tokens_total", "Prompt tokens taken in."),
            generated_tokens: make.counter("generated_tokens_total", "Tokens delivered."),
            prefix_cache_queried: make.counter(
                "prefix_cache_queried_tokens_total",
                "Prompt tokens looked up in the prefix cache.",
            ),
            prefix_cache_hit: make.counter(
                "prefix_cache_hit_tokens_total",
                "Prompt tokens found in the prefix cache.",
            ),
            host_cache_hit: make.counter(
                "host_cache_hit_tokens_total",
                "Prompt tokens of prefix hits that the KV cache alone had not; 0 without memory behind it.",
            ),
            host_cache_blocks: make.gauge(
                "host_cache_blocks",
                "KV blocks in the host's memory behind the cache.",
            ),
            host_cache_stores: make.counter(
                "host_cache_stores_total",
                "KV blocks copied to the host's memory.",
            ),
            host_cache_loads: make.counter(
                "host_cache_loads_total",
                "KV blocks copied back from the host's memory.",
            ),
            preemptions: make.counter("preemptions_total", "Running requests that gave way."),
            worker_restarts: make.counter("worker_restarts_total", "Starts after a death."),
            worker_divergences: make.counter(
                "worker_divergences_total",
                "Worker groups ended because a rank carried out other commands or drew other tokens.",
            ),
            time_to_first_token: make.histogram(
                "time_to_first_token_seconds",
                "From submission to the first token.",
                LATENCY,
            ),
            inter_token: make.histogram(
                "inter_token_seconds",
                "Between tokens of one generation.",
                STEP,
            ),
            request_duration: make.histogram(
                "request_seconds",
                "From submission to the end of a generation.",
                LATENCY,
            ),
            queue_time: make.histogram(
                "queue_seconds",
                "From arrival to the plan of the first step that runs the request.",
                LATENCY,
            ),
            step_duration: make.histogram(
                "step_seconds",
                "Time that the worker took for a step.",
                STEP,
            ),
            planner: make.histogram(
                "planner_seconds",
                "Time of the scheduler's turns in which it planned a step, until the plans had left: what it \
                 was told taken in, steps planned and sent.",
                PLANNER,
            ),
            deliver: make.histogram(
                "deliver_seconds",
                "Time in which the scheduler's thread handed a turn's results to their requests, after its \
                 plans had left.",
                PLANNER,
            ),
            worker_launches: make.counter(
                "worker_launches_total",
                "Kernels, graphs and copies that the worker's host launched; 0 on the CPU.",
            ),
            worker_host_draws: make.counter(
                "worker_host_draw_steps_total",
                "Steps whose tokens the worker's host drew, so that the next one waited.",
            ),
            worker_graphs: make.gauge(
                "worker_graphs",
                "Kinds of steps that the worker has captured, those made while serving included; 0 on the CPU.",
            ),
            worker_uncaptured: make.counter(
                "worker_uncaptured_steps_total",
                "Steps launched op by op though the worker captures steps: of a kind that is new, or for which \
                 there is no memory; 0 on the CPU.",
            ),
            worker_busy: make.elapsed("worker_busy_seconds_total", "Time that steps ran."),
            worker_idle: make.elapsed(
                "worker_idle_seconds_total",
                "Time between steps in which the device ran nothing though there were requests; \
                 0 on the CPU.",
            ),
            worker_steps: make.histograms(
                "worker_step_seconds",
                "Time that a step ran on the device, by its kind and its tokens, rounded up to a \
                 power of two.",
                STEP,
                &["kind", "tokens"],
            ),
            connections: make.gauge("connections", "Client connections that are open."),
            stalled_clients: make.counter(
                "stalled_clients_total",
                "Streams given up because the client did not read.",
            ),
            ready: make.gauge("ready", "Whether requests are served."),
            startup: make.seconds(
                "startup_seconds",
                "What parts of the start took, 0 before they are over; of the newest worker.",
                &["phase"],
            ),
            kv_blocks: make.gauges("kv_blocks", "KV blocks by what holds them.", &["state"]),
            steps_planned: make.counters(
                "steps_planned_total",
                "Steps planned, by how many others were in flight then.",
                &["in_flight"],
            ),
            placements: make.counters(
                "placements_total",
                "Requests placed on one of several data-parallel shards, by what decided.",
                &["placed_by"],
            ),
            replies: make.counters("http_replies_total", "Replies.", &["door", "status"]),
            finished: make.counters("generations_total", "Ends of generations.", &["finished_by"]),
            refused: make.counters("refused_total", "Requests not admitted.", &["refused_by"]),
            unknown_fields: make.counters(
                "unknown_fields_total",
                "Fields of requests that this server does not know; they have no effect.",
                &["door"],
            ),
            info: make.gauges("build_info", "1; the version is a label.", &["version"]),
            device: make.gauges(
                "device_info",
                "1; what runs the model, and why that, are labels.",
                &["backend", "device"],
            ),
            registry,
        };
        metrics.info.with_label_values(&[version]).set(1);
        for door in Door::ALL {
            drop(metrics.unknown_fields(*door));
            for class in StatusClass::ALL {
                drop(metrics.replies(*door, *class));
            }
        }
        FinishedBy::ALL.iter().for_each(|by| drop(metrics.finished(*by)));
        PlacedBy::ALL.iter().for_each(|by| drop(metrics.placements(*by)));
        RefusedBy::ALL.iter().for_each(|by| drop(metrics.refused(*by)));
        StartupPhase::ALL.iter().for_each(|phase| drop(metrics.startup(*phase)));
        BlockState::ALL.iter().for_each(|state| drop(metrics.kv_blocks(*state)));
        StepKind::ALL.iter().for_each(|kind| drop(metrics.worker_step(*kind, 1)));
        StepsAhead::ALL.iter().for_each(|steps| drop(metrics.steps_planned(*steps)));
        metrics
    }

    /// Has `sample` called whenever the metrics are read, on the reader's thread; the first one given
    /// stays.
    pub fn before_scrape(&self, sample: impl Fn(&Self) + Send + Sync + 'static) {
        let _ = self.sampler.set(Sampler(Box::new(sample)));
    }

    /// Seconds that a part of the start took.
    #[must_use]
    pub fn startup(&self, phase: StartupPhase) -> Gauge {
        self.startup.with_label_values(&[phase.as_str()])
    }

    /// KV blocks in this state.
    #[must_use]
    pub fn kv_blocks(&self, state: BlockState) -> IntGauge {
        self.kv_blocks.with_label_values(&[state.as_str()])
    }

    /// Steps planned while this many others were in flight.
    #[must_use]
    pub fn steps_planned(&self, in_flight: StepsAhead) -> IntCounter {
        self.steps_planned.with_label_values(&[in_flight.as_str()])
    }

    /// Time on the device of steps of a kind and size.
    #[must_use]
    pub fn worker_step(&self, kind: StepKind, tokens: u32) -> Histogram {
        let tokens = tokens.checked_next_power_of_two().unwrap_or(u32::MAX).to_string();
        self.worker_steps.with_label_values(&[kind.as_str(), &tokens])
    }

    /// Requests placed on a data-parallel shard for this reason.
    #[must_use]
    pub fn placements(&self, by: PlacedBy) -> IntCounter {
        self.placements.with_label_values(&[by.as_str()])
    }

    /// Replies sent through a door.
    #[must_use]
    pub fn replies(&self, door: Door, class: StatusClass) -> IntCounter {
        self.replies.with_label_values(&[door.as_str(), class.as_str()])
    }

    /// Generations that ended this way.
    #[must_use]
    pub fn finished(&self, by: FinishedBy) -> IntCounter {
        self.finished.with_label_values(&[by.as_str()])
    }

    /// Requests refused for this reason.
    #[must_use]
    pub fn refused(&self, by: RefusedBy) -> IntCounter {
        self.refused.with_label_values(&[by.as_str()])
    }

    /// Unknown fields in requests through a door.
    #[must_use]
    pub fn unknown_fields(&self, door: Door) -> IntCounter {
        self.unknown_fields.with_label_values(&[door.as_str()])
    }

    /// The metrics by name.
    pub(crate) fn families(&self) -> Vec<MetricFamily> {
        self.registry.gather()
    }

    /// Everything in Prometheus text format; with `vllm_names` the metrics that exist there a
    /// second time under those names.
    #[must_use]
    pub fn render(&self, vllm_names: bool) -> String {
        if let Some(Sampler(sample)) = self.sampler.get() {
            sample(self);
        }
        let mut families = self.families();
        if vllm_names {
            for (ours, theirs) in VLLM_ALIASES {
                let family = families.iter().find(|family| family.name() == ours);
                let mut alias = family.expect("an alias names a metric").clone();
                alias.set_name(theirs.to_owned());
                families.push(alias);
            }
            let mut success = self.finished.collect();
            for family in &mut success {
                family.set_name(VLLM_SUCCESS.1.to_owned());
                for metric in family.mut_metric() {
                    let labels = metric.mut_label().iter_mut();
                    for label in labels.filter(|label| label.name() == "finished_by") {
                        label.set_name("finished_reason".to_owned());
                    }
                }
            }
            families.append(&mut success);
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&families, &mut text).expect("writing to memory does not fail");
        String::from_utf8(text).expect("the text format is UTF-8")
    }
}

/// Makes and registers metrics under the common prefix.
pub(crate) struct Maker<'a> {
    registry: &'a Registry,
    model: &'a str,
}

impl Maker<'_> {
    fn add<C: Collector + Clone + 'static>(&self, metric: prometheus::Result<C>) -> C {
        let metric = metric.expect("names and buckets are constants and valid");
        self.registry.register(Box::new(metric.clone())).expect("no name is used twice");
        metric
    }

    fn opts(&self, name: &str, help: &str) -> Opts {
        Opts::new(format!("tokenmill_{name}"), help).const_label("model_name", self.model)
    }

    pub(crate) fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.add(IntGauge::with_opts(self.opts(name, help)))
    }

    pub(crate) fn ratio(&self, name: &str, help: &str) -> Gauge {
        self.add(Gauge::with_opts(self.opts(name, help)))
    }

    pub(crate) fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.add(IntGaugeVec::new(self.opts(name, help), labels))
    }

    fn seconds(&self, name: &str, help: &str, labels: &[&str]) -> GaugeVec {
        self.add(GaugeVec::new(self.opts(name, help), labels))
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.add(IntCounter::with_opts(self.opts(name, help)))
    }

    fn elapsed(&self, name: &str, help: &str) -> Counter {
        self.add(Counter::with_opts(self.opts(name, help)))
    }

    fn histograms(&self, name: &str, help: &str, buckets: &[f64], labels: &[&str]) -> HistogramVec {
        let opts = HistogramOpts::from(self.opts(name, help)).buckets(buckets.to_vec());
        self.add(HistogramVec::new(opts, labels))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.add(IntCounterVec::new(self.opts(name, help), labels))
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        let opts = HistogramOpts::from(self.opts(name, help)).buckets(buckets.to_vec());
        self.add(Histogram::with_opts(opts))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_exist_before_anything_happened_and_aliases_agree() {
        let metrics = Metrics::new("m", "1");
        metrics.requests_waiting.set(3);
        metrics.finished(FinishedBy::Stop).inc();
        let text = metrics.render(true);
        for line in [
            "tokenmill_requests_waiting{model_name=\"m\"} 3",
            "vllm:num_requests_waiting{model_name=\"m\"} 3",
            "tokenmill_refused_total{model_name=\"m\",refused_by=\"queue_full\"} 0",
            "vllm:request_success_total{finished_reason=\"stop\",model_name=\"m\"} 1",
            "tokenmill_http_replies_total{door=\"chat_completions\",model_name=\"m\",status=\"5xx\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        assert!(!metrics.render(false).contains("vllm:"));
    }

    #[test]
    fn gauges_are_sampled_when_they_are_read() {
        let metrics = Metrics::new("m", "1");
        metrics.before_scrape(|metrics| metrics.gpu.temperature.inc());
        metrics.before_scrape(|_| panic!("the first one stays"));
        assert_eq!(metrics.gpu.temperature.get(), 0);
        let text = metrics.render(false);
        assert!(text.contains("tokenmill_gpu_temperature_celsius{model_name=\"m\"} 1"), "{text}");
        assert!(text.contains("tokenmill_gpu_throttled{model_name=\"m\",reason=\"power\"} 0"));
    }
}
