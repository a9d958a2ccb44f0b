//! What overload and fairness come to in figures: goodput against offered load, how soon a replica
//! recovers, how far tenants with work drift apart, how long the least urgent wait.
//!
//! The settings are fixed, so that a record can be made again. Invariant: only what came in the
//! measured span counts, and what came in it counts whatever its ending.

use crate::overload::{Ending, Record, Sample, Setting, Source, Way, limits, run};
use core::time::Duration;
use ids::{TenantId, Timestamp};
use scheduler::Config;

/// How long clients wait.
pub const DEADLINE: Duration = Duration::from_secs(10);
/// Prompts and outputs: mean 600 and 110 tokens.
const PROMPT: (u32, u32) = (200, 1000);
const OUTPUT: (u32, u32) = (20, 200);
/// A load has settled after this long.
const SETTLED: Duration = Duration::from_secs(20);
/// A load ends after this long.
const LOADED: Duration = Duration::from_secs(80);
/// Virtual tokens of a prompt and an output token, as tenants are charged.
const CHARGES: (u64, u64) = (1, 2);

/// Which scheduler is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// As served.
    Served,
    /// Without tenants, without a look ahead at deadlines, in order of arrival.
    Arrival,
}

impl Policy {
    /// Its name in records.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Served => "served",
            Self::Arrival => "arrival order",
        }
    }

    fn config(self) -> Config {
        match self {
            Self::Served => limits(),
            Self::Arrival => Config { patience: 0, refuse_late: false, ..limits() },
        }
    }

    fn tenant(self, tenant: u64) -> TenantId {
        TenantId(if self == Self::Served { tenant } else { 0 })
    }
}

/// What a replica gives when more waits than it can take.
#[derive(Clone, Copy, Debug)]
pub struct Capacity {
    /// Requests a second.
    pub requests: f64,
    /// Output tokens a second.
    pub output: f64,
    /// Virtual tokens a second.
    pub virtual_tokens: f64,
}

/// One offered load.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Of the capacity.
    pub offered: f64,
    /// Output tokens a second of requests that met their deadline.
    pub goodput: f64,
    /// Output tokens a second of all.
    pub throughput: f64,
    /// Requests that came.
    pub requests: u64,
    /// Of these, by [`Way`] in its order.
    pub ways: [u64; 6],
    /// Most requests in the queue.
    pub queued_most: u32,
    /// Most prompt tokens in the queue.
    pub queued_tokens_most: u64,
    /// Of the done, from arrival to first seat: median and 99th percentile, in seconds.
    pub wait_s: [f64; 2],
}

/// Four tenants with equal demand.
fn equal(policy: Policy, rate: f64, active: &[(Duration, Duration)]) -> Vec<Source> {
    let source = |tenant| Source {
        tenant: policy.tenant(tenant),
        priority: 0,
        rate: rate / 4.0,
        prompt: PROMPT,
        output: OUTPUT,
        deadline: Some(DEADLINE),
        active: active.to_vec(),
    };
    (1..=4).map(source).collect()
}

fn setting(seed: u64, config: Config, sources: Vec<Source>) -> Setting {
    Setting { seed, config, blocks: 1200, sources }
}

/// Measures the capacity: four times as much as could be served, from clients that wait for ever.
#[must_use]
pub fn capacity(seed: u64) -> Capacity {
    let mut sources = equal(Policy::Served, 120.0, &[(Duration::ZERO, Duration::from_secs(60))]);
    sources.iter_mut().for_each(|source| source.deadline = None);
    let record = run(&setting(seed, limits(), sources));
    let (from, to) = (at(Duration::from_secs(10)), at(Duration::from_secs(60)));
    let seconds = to.since(from).as_secs_f64();
    let done = || record.endings.iter().filter(|end| end.ended >= from && end.ended < to);
    let served = |at: Timestamp| sample(&record, at).served.iter().sum::<u64>();
    let output: u64 = done().map(|end| u64::from(end.output)).sum();
    Capacity {
        requests: done().filter(|end| end.way == Way::Done).count() as f64 / seconds,
        output: output as f64 / seconds,
        virtual_tokens: (served(to) - served(from)) as f64 / seconds,
    }
}

/// Measures one load of so many times the capacity.
#[must_use]
pub fn load(seed: u64, capacity: Capacity, offered: f64, policy: Policy) -> Load {
    let rate = offered * capacity.requests;
    let sources = equal(policy, rate, &[(Duration::ZERO, LOADED)]);
    let record = run(&setting(seed, policy.config(), sources));
    let (from, to) = (at(SETTLED), at(LOADED));
    let seconds = to.since(from).as_secs_f64();
    let mut load = Load {
        offered,
        goodput: 0.0,
        throughput: 0.0,
        requests: 0,
        ways: [0; 6],
        queued_most: record.samples.iter().map(|sample| sample.queued).max().unwrap_or(0),
        queued_tokens_most: record.samples.iter().map(|s| s.queued_tokens).max().unwrap_or(0),
        wait_s: [0.0; 2],
    };
    let mut waits = Vec::new();
    for end in &record.endings {
        if end.arrival >= from && end.arrival < to {
            load.requests += 1;
            load.ways[end.way as usize] += 1;
        }
        // Tokens count when their request ended, so that each second's are what it could give.
        if end.ended >= from && end.ended < to {
            load.throughput += f64::from(end.output) / seconds;
            if end.way == Way::Done {
                load.goodput += f64::from(end.output) / seconds;
                waits.extend(end.started.map(|at| at.since(end.arrival)));
            }
        }
    }
    waits.sort_unstable();
    load.wait_s = [50, 99]
        .map(|percent| waits.get(waits.len() * percent / 100).map_or(0.0, Duration::as_secs_f64));
    load
}

/// How soon an overload is over.
#[derive(Clone, Copy, Debug)]
pub struct Recovery {
    /// From the end of the overload until the last of those who came after it was turned away or
    /// missed its deadline.
    pub served: Duration,
    /// From there until nobody waited.
    pub empty: Duration,
}

/// Measures what follows an overload of so many times the capacity when half of it goes on to come.
#[must_use]
pub fn recovery(seed: u64, capacity: Capacity, offered: f64) -> Recovery {
    let over = Duration::from_secs(60);
    let end = Duration::from_secs(120);
    let policy = Policy::Served;
    let mut sources = equal(policy, offered * capacity.requests, &[(Duration::ZERO, over)]);
    sources.extend(equal(policy, 0.5 * capacity.requests, &[(over, end)]));
    let record = run(&setting(seed, limits(), sources));
    let over = at(over);
    let turned_away = record.endings.iter().filter(|end| end.arrival >= over);
    let last = turned_away.filter(|end| end.way != Way::Done).map(|end| end.ended).max();
    let mut after = record.samples.iter().filter(|sample| sample.at >= over);
    let empty = after.find(|sample| sample.queued == 0).map(|sample| sample.at);
    Recovery {
        served: last.map_or(Duration::ZERO, |last| last.since(over)),
        empty: empty.map_or(Duration::MAX, |empty| empty.since(over)),
    }
}

/// Tenants of unequal demand over time.
#[derive(Clone, Debug)]
pub struct Shares {
    /// Each one's demand, of the whole capacity.
    pub demand: Vec<f64>,
    /// When each is active.
    pub active: Vec<Vec<(Duration, Duration)>>,
    /// What happened.
    pub record: Record,
    /// Jain's index of virtual tokens served to those who had work throughout.
    pub jain: f64,
    /// Largest change of the difference between two tenants while both had work, virtual tokens.
    pub drift: u64,
    /// What it may be: twice the larger of the largest prompt and all seats' longest outputs.
    pub bound: u64,
}

/// Five tenants: demands of an eighth, a half, one, two and four times the capacity; the last one
/// pauses for twenty seconds. No deadlines.
#[must_use]
pub fn shares(seed: u64, capacity: Capacity, policy: Policy) -> Shares {
    let secs = Duration::from_secs;
    let demand = vec![0.125, 0.5, 1.0, 2.0, 4.0];
    let whole = vec![(secs(0), secs(60))];
    let mut active = vec![whole; 4];
    active.push(vec![(secs(0), secs(20)), (secs(40), secs(60))]);
    let sources = demand.iter().zip(&active).zip(1..).map(|((demand, active), tenant)| Source {
        tenant: policy.tenant(tenant),
        priority: 0,
        rate: demand * capacity.requests,
        prompt: PROMPT,
        output: OUTPUT,
        deadline: None,
        active: active.clone(),
    });
    let record = run(&setting(seed, policy.config(), sources.collect()));
    let (from, to) = (at(secs(10)), at(secs(60)));
    // Those who wait in every sample.
    let steady: Vec<usize> = (0..demand.len())
        .filter(|i| between(&record, from, to).all(|sample| sample.waiting[*i] > 0))
        .collect();
    let had =
        |i: &usize| (sample(&record, to).served[*i] - sample(&record, from).served[*i]) as f64;
    let served: Vec<f64> = steady.iter().map(had).collect();
    let seats = u64::from(limits().max_running) * u64::from(OUTPUT.1);
    let bound = 2 * (CHARGES.0 * u64::from(PROMPT.1)).max(CHARGES.1 * seats);
    let drift = drift(&record, at(secs(60)));
    Shares { demand, active, jain: jain(&served), drift, bound, record }
}

/// How long requests of the least urgent class wait while the most urgent alone are twice the
/// capacity.
#[derive(Clone, Copy, Debug)]
pub struct Least {
    /// Requests of the class that came.
    pub requests: u64,
    /// Of these, served.
    pub done: u64,
    /// Of these, turned away because the places of their class were taken.
    pub full: u64,
    /// Longest wait.
    pub longest: Duration,
    /// What the stated bound allowed that request.
    pub bound: Duration,
    /// Requests that waited longer than the bound allowed them.
    pub over: u64,
    /// 99th percentile of the most urgent class's waits.
    pub urgent_p99: Duration,
}

/// Measures the waits of the least urgent.
#[must_use]
pub fn least_urgent(seed: u64, capacity: Capacity, patience: u32) -> Least {
    let active = vec![(Duration::ZERO, LOADED)];
    let source = |tenant, priority, demand: f64| Source {
        tenant: TenantId(tenant),
        priority,
        rate: demand * capacity.requests,
        prompt: PROMPT,
        output: OUTPUT,
        deadline: None,
        active: active.clone(),
    };
    let sources = vec![source(1, -1, 2.0), source(2, 0, 1.0), source(3, 7, 0.01)];
    // A short queue keeps the waits of the urgent apart from those of the rest.
    let config = Config { patience, queue_requests: 64, ..limits() };
    let record = run(&setting(seed, config, sources));
    let mut least = Least {
        requests: 0,
        done: 0,
        full: 0,
        longest: Duration::ZERO,
        bound: Duration::ZERO,
        over: 0,
        urgent_p99: Duration::ZERO,
    };
    let mut urgent = Vec::new();
    for end in record.endings.iter().filter(|end| end.arrival < at(LOADED)) {
        let waited = end.started.map(|started| started.since(end.arrival));
        match (end.source, waited) {
            (2, waited) => {
                least.requests += 1;
                least.done += u64::from(end.way == Way::Done);
                least.full += u64::from(matches!(end.way, Way::Full | Way::Shed));
                let waited = waited.unwrap_or_else(|| end.ended.since(end.arrival));
                let bound = longest_wait(&record, end, patience, capacity);
                least.over += u64::from(waited > bound);
                if waited >= least.longest {
                    (least.longest, least.bound) = (waited, bound);
                }
            }
            (0, Some(waited)) => urgent.push(waited),
            _ => {}
        }
    }
    urgent.sort_unstable();
    least.urgent_p99 = urgent.get(urgent.len() * 99 / 100).copied().unwrap_or_default();
    least
}

/// The stated bound for one request: what is served to others before it and each that was in line when
/// it came are overdue, and what those with a seat can still be given when they are.
fn longest_wait(record: &Record, of: &Ending, patience: u32, capacity: Capacity) -> Duration {
    let cost = |prompt: u32| CHARGES.0 * u64::from(prompt) + CHARGES.1 * u64::from(OUTPUT.1);
    let seated = u64::from(limits().max_running) * cost(PROMPT.1);
    let in_line = record.endings.iter().filter(|other| {
        other.arrival <= of.arrival && other.started.unwrap_or(other.ended) > of.arrival
    });
    let allowed: u64 = in_line.map(|one| u64::from(patience) * cost(one.prompt) + seated).sum();
    Duration::from_secs_f64(allowed as f64 / capacity.virtual_tokens)
}

/// Jain's index: 1 when all have the same, 1/n when one has all.
#[must_use]
pub fn jain(served: &[f64]) -> f64 {
    let sum: f64 = served.iter().sum();
    let squares: f64 = served.iter().map(|one| one * one).sum();
    if squares > 0.0 { sum * sum / (served.len() as f64 * squares) } else { 1.0 }
}

/// Over all pairs, how much the difference of what two were served changed at most within a span in
/// which both had work.
fn drift(record: &Record, until: Timestamp) -> u64 {
    let tenants = record.samples.first().map_or(0, |sample| sample.served.len());
    let mut most = 0;
    for a in 0..tenants {
        for b in a + 1..tenants {
            let mut span: Option<(i64, i64)> = None;
            for sample in record.samples.iter().filter(|sample| sample.at < until) {
                if sample.waiting[a] == 0 || sample.waiting[b] == 0 {
                    span = None;
                    continue;
                }
                let ahead = sample.served[a].cast_signed() - sample.served[b].cast_signed();
                let (least, largest) = span.unwrap_or((ahead, ahead));
                let (least, largest) = (least.min(ahead), largest.max(ahead));
                most = most.max(largest.abs_diff(least));
                span = Some((least, largest));
            }
        }
    }
    most
}

fn at(since: Duration) -> Timestamp {
    Timestamp::ZERO.after(since)
}

fn between(record: &Record, from: Timestamp, to: Timestamp) -> impl Iterator<Item = &Sample> {
    record.samples.iter().filter(move |sample| sample.at >= from && sample.at < to)
}

/// The state at a time.
#[must_use]
pub fn sample(record: &Record, at: Timestamp) -> &Sample {
    let behind = record.samples.partition_point(|sample| sample.at <= at);
    &record.samples[behind.saturating_sub(1)]
}
