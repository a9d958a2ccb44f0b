//! How long the scheduler takes for a step, measured from outside: the caller passes the clock.
//!
//! One step is what the driver does between two outcomes: handle the outcome (with churn also one
//! abort and one submission), drain what is said, plan the next step, drain again, tell the journal of all
//! that, encode the plan.
//! Contexts are private from their first token on, so that tables are as large as they get. How a
//! plan is encoded is the caller's: the scheduler knows no wire.
//! Invariant: every measured step decodes every request, and the stated number of blocks is sealed.

use crate::echo::Echo;
use core::time::Duration;
use ids::{
    BLOCK_TOKENS, Bytes, GroupId, HashKey, Incarnation, RequestId, ShardId, TenantId, Timestamp,
    TokenId, Tokens,
};
use kv_cache::carve;
use scheduler::{Config, Event, Journal, Output, Planned, Scheduler, Submit, WorkerReady};
use std::sync::Arc;
use step::{GroupKind, GroupSpec, Outcome, Sampling, StepPlan};

/// What the measured steps do besides decoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing.
    Steady,
    /// In each step one request of full context ends and one arrives.
    Churn,
    /// Nothing, while a thousand requests of sixty-four tenants wait for a seat.
    Line,
}

/// Bytes of the journal, as the server keeps it.
const JOURNAL: usize = 16 << 20;
/// Requests that wait in a case of [`Kind::Line`].
const WAITING: u64 = 1000;

/// A case to measure.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Requests that decode.
    pub requests: u32,
    /// Tokens of each one's context.
    pub context: Tokens,
    /// What else happens.
    pub kind: Kind,
    /// Steps measured.
    pub steps: u32,
}

/// What was measured, in microseconds per step.
#[derive(Clone, Copy, Debug)]
pub struct Timings {
    /// The case.
    pub case: Case,
    /// Mean.
    pub mean_us: f64,
    /// Median.
    pub p50_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
    /// Blocks sealed per step.
    pub seals: f64,
}

/// Why a case could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The scheduler's limits.
    #[error("the limits of the case contradict each other")]
    Config(#[from] scheduler::ConfigError),
    /// The cache.
    #[error("the cache of the case cannot be carved")]
    Carve(#[from] kv_cache::CarveError),
    /// The scheduler did not do what the case is about.
    #[error("not the case that was to be measured: {0}")]
    Strayed(String),
}

/// Measures a case. `meter` runs what it is given and says how much time that took; `encode` turns a
/// plan into what is sent, and is part of the step.
///
/// # Errors
/// When the scheduler does not settle into the case.
pub fn measure(
    case: Case,
    mut meter: impl FnMut(&mut dyn FnMut()) -> Duration,
    mut encode: impl FnMut(&StepPlan),
) -> Result<Timings, BenchError> {
    let mut bench = Bench::new(case)?;
    bench.settle()?;
    let mut spent = Vec::with_capacity(case.steps as usize);
    let sealed_before = bench.sealed();
    for _ in 0..case.steps {
        let arrival = (case.kind == Kind::Churn).then(|| bench.make_request());
        let Some(outcome) = bench.echo.outcomes.pop_front() else {
            return Err(BenchError::Strayed("no outcome is due".into()));
        };
        let (mut outcome, mut arrival, mut planned) = (Some(outcome), arrival, None);
        spent.push(meter(&mut || {
            if let Some(outcome) = outcome.take() {
                bench.answer(outcome);
            }
            if let Some(submit) = arrival.take() {
                bench.replace_one(submit);
            }
            bench.drain();
            planned = bench.plan();
            if let Some(planned) = &planned {
                encode(&planned.plan);
                bench.journal.sent(bench.now, planned.plan.seq);
            }
            bench.journal.delivered(bench.now);
        }));
        bench.now = bench.now.after(Duration::from_millis(10));
        let Some(planned) = planned else {
            return Err(BenchError::Strayed("nothing was planned".into()));
        };
        if case.kind != Kind::Churn && planned.report.decode != case.requests {
            return Err(BenchError::Strayed(format!("{} decode", planned.report.decode)));
        }
        bench.carry_out(planned);
    }
    let seals = f64::from(bench.sealed().saturating_sub(sealed_before)) / f64::from(case.steps);
    spent.sort_unstable();
    let us = |duration: Duration| duration.as_secs_f64() * 1e6;
    let at = |percent: usize| {
        spent.get((spent.len() * percent / 100).min(spent.len().saturating_sub(1)))
    };
    Ok(Timings {
        case,
        mean_us: us(spent.iter().sum::<Duration>()) / f64::from(case.steps.max(1)),
        p50_us: at(50).copied().map_or(0.0, us),
        p99_us: at(99).copied().map_or(0.0, us),
        seals,
    })
}

struct Bench {
    case: Case,
    scheduler: Scheduler,
    journal: Journal,
    echo: Echo,
    now: Timestamp,
    document: Vec<TokenId>,
    hashes: Vec<ids::BlockHash>,
    root: ids::BlockHash,
    next: u64,
    oldest: u64,
}

impl Bench {
    fn new(case: Case) -> Result<Self, BenchError> {
        let spec = GroupSpec { group: GroupId(0), kind: GroupKind::Full, block_bytes: Bytes(64) };
        // Every request could hold its context alone, with room for output.
        let blocks = u64::from(case.requests + 8)
            * u64::from(case.context.blocks_ceil().0 + case.steps / BLOCK_TOKENS + 8);
        let carving = carve(&[spec], Bytes(64 * blocks), Bytes(64))?;
        let key = HashKey::derive("bench", b"");
        let config = Config {
            // With a line nobody else finds a seat.
            max_running: case.requests + if case.kind == Kind::Line { 0 } else { 4 },
            max_step_tokens: Tokens(16_384),
            max_chunk: Tokens(16_384),
            max_context: Tokens(case.context.0 + case.steps + 4096),
            queue_tokens: u64::MAX / 2,
            ..Config::serving(key.clone())
        };
        let mut scheduler = Scheduler::new(config)?;
        let ready = WorkerReady { incarnation: Incarnation(1), groups: vec![spec], carving };
        scheduler.handle(Timestamp::ZERO, Event::WorkerReady(Box::new(ready)));
        let mut journal = Journal::new(JOURNAL, scheduler.config().max_running, 1);
        journal.ready(Timestamp::ZERO, Incarnation(1));
        let document: Vec<_> = (0..case.context.0).map(TokenId).collect();
        let root = key.root(b"");
        let hashes = key.chain_all(root, &document);
        let (echo, now) = (Echo::default(), Timestamp::ZERO);
        Ok(Self { case, scheduler, journal, echo, now, document, hashes, root, next: 1, oldest: 1 })
    }

    /// Brings all requests to decoding, their contexts private: each differs from its first token,
    /// so nothing is shared and tables are as large as they can be.
    fn settle(&mut self) -> Result<(), BenchError> {
        for _ in 0..self.case.requests {
            let submit = self.make_request();
            self.submit(submit);
        }
        let waiting = if self.case.kind == Kind::Line { WAITING } else { 0 };
        for i in 0..waiting {
            let mut submit = self.make_request();
            submit.prompt = submit.prompt[..submit.prompt.len().min(100)].into();
            submit.prompt_hashes = [].into();
            // Behind those who run.
            (submit.priority, submit.tenant) = (10 + (i % 3) as i32, TenantId(i % 64));
            self.submit(submit);
        }
        // Prompts run in chunks of the step's size; then steps for the last to settle.
        let chunks = u64::from(self.case.context.0) * u64::from(self.case.requests) / 16_000 + 256;
        let mut steady = 0;
        for _ in 0..4 * chunks {
            self.drain();
            while let Some(planned) = self.plan() {
                self.journal.sent(self.now, planned.plan.seq);
                steady += u32::from(planned.report.decode == self.case.requests);
                self.carry_out(planned);
                // By then every prompt's outcome is in, and each request took three blocks.
                if steady > 3 * BLOCK_TOKENS {
                    return Ok(());
                }
            }
            if let Some(outcome) = self.echo.outcomes.pop_front() {
                self.answer(outcome);
            }
            self.journal.delivered(self.now);
            self.now = self.now.after(Duration::from_millis(10));
        }
        let running = self.scheduler.gauges().running;
        Err(BenchError::Strayed(format!("{running} requests run")))
    }

    fn make_request(&mut self) -> Box<Submit> {
        let request = RequestId(self.next);
        self.next += 1;
        let mut prompt = self.document.clone();
        // Lengths differ by a token, so that block boundaries are spread evenly over steps:
        // requests / 64 seals in each.
        let shorter = (self.next % u64::from(BLOCK_TOKENS)) as usize;
        prompt.truncate(prompt.len().saturating_sub(shorter).max(1));
        let churns = self.case.kind == Kind::Churn;
        let hashes = if churns && self.next > u64::from(self.case.requests) + 1 {
            // Arrivals while measuring find the document in the cache, as an agent's next turn.
            self.hashes[..prompt.len() / BLOCK_TOKENS as usize].to_vec()
        } else {
            if self.next > 2 {
                prompt[0] = TokenId(self.next as u32);
            }
            let key = &self.scheduler.config().hash_key;
            key.chain_all(self.root, &prompt)
        };
        Box::new(Submit {
            request,
            prompt: prompt.into(),
            prompt_hashes: hashes.into(),
            root: self.root,
            sampling: Arc::new(Sampling::default()),
            // The first runs beside the prompts of all others, 2,100 steps in the largest case.
            max_tokens: Tokens(self.case.steps + 4096),
            end_tokens: [].into(),
            ignore_eos: true,
            stop_tokens: [].into(),
            prompt_logprobs: None,
            priority: (self.next % 3) as i32,
            tenant: TenantId(self.next % 8),
            deadline: Some(self.now.after(Duration::from_secs(24 * 3600))),
            arrival: self.now,
        })
    }

    /// The engine's time is not measured; a fixed one keeps the cost model calm.
    fn carry_out(&mut self, planned: Planned) {
        self.echo.step(&planned, 10_000_000, |_| TokenId(1));
        self.scheduler.recycle(planned.plan);
    }

    fn replace_one(&mut self, submit: Box<Submit>) {
        self.scheduler.handle(self.now, Event::Abort(RequestId(self.oldest)));
        self.oldest += 1;
        self.submit(submit);
    }

    fn submit(&mut self, submit: Box<Submit>) {
        self.journal.submitted(&submit);
        self.scheduler.handle(self.now, Event::Submit(submit));
    }

    fn answer(&mut self, outcome: Outcome) {
        self.journal.answered(self.now, outcome.incarnation, outcome.seq, &outcome.timing);
        self.scheduler.handle(self.now, Event::Outcome(outcome));
    }

    /// Plans; what the plan made the scheduler say is drained.
    fn plan(&mut self) -> Option<Planned> {
        let planned = self.scheduler.plan_step(self.now);
        self.drain();
        self.journal.looked(ShardId(0), self.scheduler.first_in_line());
        if let Some(planned) = &planned {
            self.journal.planned(self.now, planned, self.scheduler.stalls());
        }
        planned
    }

    fn drain(&mut self) {
        while let Some(output) = self.scheduler.poll_output() {
            match output {
                Output::Token { token, .. } => {
                    core::hint::black_box(token);
                }
                Output::Upload(_) | Output::Finished { .. } | Output::Refused { .. } => {
                    self.journal.said(self.now, &output);
                }
                Output::Forget(..)
                | Output::Started { .. }
                | Output::PromptLogprobs(_)
                | Output::RestartWorker { .. } => {}
            }
        }
    }

    fn sealed(&self) -> u32 {
        let counts = self.scheduler.cache().map(|cache| cache.counts(GroupId(0)));
        counts.map_or(0, |counts| counts.shared.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A meter by which everything takes a microsecond: enough to run the cases.
    fn tick(run: &mut dyn FnMut()) -> Duration {
        run();
        Duration::from_micros(1)
    }

    #[test]
    fn the_cases_are_what_they_say() {
        for kind in [Kind::Steady, Kind::Churn, Kind::Line] {
            let case = Case { requests: 256, context: Tokens(700), kind, steps: 256 };
            let timings = measure(case, tick, |_| ()).expect("measures");
            assert!((timings.mean_us - 1.0).abs() < 1e-6);
            if kind == Kind::Steady {
                assert!((timings.seals - 4.0).abs() < 0.5, "{} seals a step", timings.seals);
            }
        }
    }
}
