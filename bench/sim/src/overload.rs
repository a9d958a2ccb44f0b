//! More work than there is capacity, in virtual time: the shipped scheduler between seeded arrivals
//! of several tenants and a worker whose steps take what a cost model says.
//!
//! It measures and judges nothing; `curves` does. Invariant: a seed is a run, and
//! every request has one ending.

use crate::echo::Echo;
use crate::rng::Rng;
use core::time::Duration;
use ids::{Bytes, GroupId, HashKey, Incarnation, RequestId, TenantId, Timestamp, TokenId, Tokens};
use kv_cache::carve;
use scheduler::{
    Config, Event, FinishReason, Gauges, Output, Refusal, Scheduler, Submit, WorkerReady,
};
use std::collections::BTreeMap;
use std::sync::Arc;
use step::{GroupKind, GroupSpec, Sampling};

/// Ends an output.
const END: TokenId = TokenId(0);
/// Goes on.
const ON: TokenId = TokenId(1);

/// Requests of one kind from one tenant: a Poisson stream.
#[derive(Clone, Debug)]
pub struct Source {
    /// Whose.
    pub tenant: TenantId,
    /// Lower runs first.
    pub priority: i32,
    /// Requests a second.
    pub rate: f64,
    /// Prompt tokens, from and below.
    pub prompt: (u32, u32),
    /// Output tokens until the end token, from and below; the scheduler knows the bound alone.
    pub output: (u32, u32),
    /// How long its clients wait.
    pub deadline: Option<Duration>,
    /// When it is active.
    pub active: Vec<(Duration, Duration)>,
}

/// What a run is about.
#[derive(Clone, Debug)]
pub struct Setting {
    /// Arrivals and lengths follow from it.
    pub seed: u64,
    /// The scheduler's limits.
    pub config: Config,
    /// KV blocks of 64 tokens.
    pub blocks: u64,
    /// Who comes.
    pub sources: Vec<Source>,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Whole, before its deadline if it had one.
    Done,
    /// At its deadline, after it had run.
    Missed,
    /// At its deadline, before it ran.
    Waited,
    /// Before it ran, because it could not have met its deadline.
    Unreachable,
    /// At the door of a full queue.
    Full,
    /// Out of a full queue, for another.
    Shed,
}

/// One request's fate.
#[derive(Clone, Copy, Debug)]
pub struct Ending {
    /// Index of its source.
    pub source: usize,
    /// When it came.
    pub arrival: Timestamp,
    /// When it got its first seat.
    pub started: Option<Timestamp>,
    /// When it ended.
    pub ended: Timestamp,
    /// How.
    pub way: Way,
    /// Tokens of its prompt.
    pub prompt: u32,
    /// Tokens that it generated.
    pub output: u32,
    /// How long it was told to stay away, where it was.
    pub retry_after: Option<Duration>,
}

/// The state at one moment.
#[derive(Clone, Debug)]
pub struct Sample {
    /// When.
    pub at: Timestamp,
    /// Requests that never ran.
    pub queued: u32,
    /// Their prompt tokens.
    pub queued_tokens: u64,
    /// Virtual tokens served, by source.
    pub served: Vec<u64>,
    /// Requests waiting, by source.
    pub waiting: Vec<u32>,
}

/// Everything that happened.
#[derive(Clone, Debug, Default)]
pub struct Record {
    /// In the order of ends.
    pub endings: Vec<Ending>,
    /// Ten a second.
    pub samples: Vec<Sample>,
    /// The scheduler's figures at the end.
    pub gauges: Gauges,
    /// Steps.
    pub steps: u64,
}

/// How long a step takes: 8 ms, 60 us for each output token and 15 us for each prompt token.
#[must_use]
pub fn step_time(decode: u32, prefill: u32) -> Duration {
    Duration::from_micros(8_000 + 60 * u64::from(decode) + 15 * u64::from(prefill))
}

/// Limits of a replica with 48 seats and everything on that serving turns on.
#[must_use]
pub fn limits() -> Config {
    Config {
        max_running: 48,
        max_step_tokens: Tokens(1024),
        max_chunk: Tokens(1024),
        max_context: Tokens(8192),
        queue_requests: 512,
        queue_tokens: 512 * 1024,
        ..Config::serving(HashKey::derive("overload", b""))
    }
}

struct Guest {
    ending: Ending,
    left: u32,
}

struct Site {
    rng: Rng,
    now: Timestamp,
    sources: Vec<Source>,
    key: HashKey,
    /// The next arrival of each source.
    coming: Vec<Option<Timestamp>>,
    scheduler: Scheduler,
    echo: Echo,
    /// When each outcome in `echo` is there.
    due: std::collections::VecDeque<Timestamp>,
    busy_until: Timestamp,
    guests: BTreeMap<RequestId, Guest>,
    next: u64,
    served: Vec<u64>,
    waiting: Vec<u32>,
    sampled_at: Timestamp,
    record: Record,
}

/// Runs until the last request has ended.
///
/// # Panics
/// When the setting's limits contradict each other, or a request never ends.
#[must_use]
pub fn run(setting: &Setting) -> Record {
    let mut site = Site::new(setting);
    while site.turn() {}
    assert!(site.guests.is_empty(), "requests never end: {:?}", site.scheduler.explain());
    site.record.gauges = site.scheduler.gauges();
    site.record
}

impl Site {
    fn new(setting: &Setting) -> Self {
        let spec = GroupSpec { group: GroupId(0), kind: GroupKind::Full, block_bytes: Bytes(64) };
        let carving = carve(&[spec], Bytes(64 * setting.blocks), Bytes(64)).expect("a cache");
        let mut scheduler = Scheduler::new(setting.config.clone()).expect("limits that agree");
        let ready = WorkerReady { incarnation: Incarnation(1), groups: vec![spec], carving };
        scheduler.handle(Timestamp::ZERO, Event::WorkerReady(Box::new(ready)));
        let sources = setting.sources.clone();
        let mut rng = Rng::new(setting.seed);
        let first = |source: &Source| following(&mut rng, source, Timestamp::ZERO);
        let coming = sources.iter().map(first).collect();
        Self {
            now: Timestamp::ZERO,
            key: setting.config.hash_key.clone(),
            coming,
            scheduler,
            echo: Echo::default(),
            due: std::collections::VecDeque::new(),
            busy_until: Timestamp::ZERO,
            guests: BTreeMap::new(),
            next: 1,
            served: vec![0; sources.len()],
            waiting: vec![0; sources.len()],
            sampled_at: Timestamp::ZERO,
            record: Record::default(),
            rng,
            sources,
        }
    }

    /// Whatever is next; false when nothing is.
    fn turn(&mut self) -> bool {
        let arrivals = self.coming.iter().enumerate();
        let arrival = arrivals.filter_map(|(i, at)| at.map(|at| (at, i))).min();
        let outcome = self.due.front().copied();
        let wakeup = self.scheduler.next_wakeup();
        let times = [arrival.map(|(at, _)| at), outcome, wakeup];
        let Some(at) = times.into_iter().flatten().min() else { return false };
        self.now = self.now.max(at);
        self.sample();
        if outcome == Some(at) {
            self.due.pop_front();
            if let Some(outcome) = self.echo.outcomes.pop_front() {
                self.scheduler.handle(self.now, Event::Outcome(outcome));
            }
        } else if let Some((_, source)) = arrival.filter(|(first, _)| *first == at) {
            self.arrive(source);
        } else {
            self.scheduler.handle(self.now, Event::Wakeup);
        }
        self.hear();
        while let Some(planned) = self.scheduler.plan_step(self.now) {
            self.hear();
            let took = step_time(planned.report.decode, planned.report.prefill_tokens.0);
            self.busy_until = self.busy_until.max(self.now).after(took);
            self.due.push_back(self.busy_until);
            let guests = &mut self.guests;
            let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
            self.echo.step(&planned, ns, |request| {
                let Some(guest) = guests.get_mut(&request) else { return END };
                guest.left = guest.left.saturating_sub(1);
                if guest.left == 0 { END } else { ON }
            });
            self.record.steps += 1;
        }
        self.hear();
        true
    }

    fn arrive(&mut self, index: usize) {
        let source = &self.sources[index];
        let between = |rng: &mut Rng, (from, below): (u32, u32)| {
            from + rng.below_u32(below.saturating_sub(from).max(1))
        };
        let prompt_tokens = between(&mut self.rng, source.prompt);
        let output = between(&mut self.rng, source.output);
        let request = RequestId(self.next);
        self.next += 1;
        // No two prompts share a block.
        let prompt: Arc<[TokenId]> = (0..prompt_tokens)
            .map(|i| TokenId(if i == 0 { self.next as u32 } else { 2 + i % 500 }))
            .collect();
        let root = self.key.root(b"");
        let submit = Submit {
            request,
            prompt,
            prompt_hashes: [].into(),
            root,
            sampling: Arc::new(Sampling::default()),
            max_tokens: Tokens(source.output.1),
            end_tokens: [END].into(),
            ignore_eos: false,
            stop_tokens: [].into(),
            prompt_logprobs: None,
            priority: source.priority,
            tenant: source.tenant,
            deadline: source.deadline.map(|wait| self.now.after(wait)),
            arrival: self.now,
        };
        let ending = Ending {
            source: index,
            arrival: self.now,
            started: None,
            ended: self.now,
            way: Way::Done,
            prompt: prompt_tokens,
            output: 0,
            retry_after: None,
        };
        self.guests.insert(request, Guest { ending, left: output });
        self.waiting[index] += 1;
        self.coming[index] = following(&mut self.rng, &self.sources[index], self.now);
        self.scheduler.handle(self.now, Event::Submit(Box::new(submit)));
    }

    fn hear(&mut self) {
        while let Some(output) = self.scheduler.poll_output() {
            match output {
                Output::Started { request, cached } => {
                    let Some(guest) = self.guests.get_mut(&request) else { continue };
                    guest.ending.started = Some(self.now);
                    let source = guest.ending.source;
                    self.waiting[source] -= 1;
                    self.served[source] += u64::from(guest.ending.prompt - cached.0);
                }
                Output::Token { request, .. } => {
                    let Some(guest) = self.guests.get_mut(&request) else { continue };
                    guest.ending.output += 1;
                    self.served[guest.ending.source] += 2;
                }
                Output::Finished { request, reason, .. } => {
                    let ran = |guest: &Guest| guest.ending.started.is_some();
                    let way = match reason {
                        FinishReason::Stop(_) | FinishReason::Length => Way::Done,
                        FinishReason::Deadline if self.guests.get(&request).is_some_and(ran) => {
                            Way::Missed
                        }
                        FinishReason::Deadline => Way::Waited,
                        FinishReason::Refused(refusal) => way_of(refusal),
                        other => panic!("{request} ended {other:?}"),
                    };
                    self.end(request, way, refusal_of(reason));
                }
                Output::Refused { request, reason } => {
                    self.end(request, way_of(reason), Some(reason));
                }
                Output::Upload(_) | Output::Forget(..) | Output::PromptLogprobs(_) => {}
                Output::RestartWorker { reason, .. } => panic!("{reason}"),
            }
        }
    }

    fn end(&mut self, request: RequestId, way: Way, refusal: Option<Refusal>) {
        let Some(guest) = self.guests.remove(&request) else { return };
        let source = guest.ending.source;
        if guest.ending.started.is_none() {
            self.waiting[source] -= 1;
        }
        let retry_after = refusal.and_then(|refusal| refusal.retry_after());
        self.record.endings.push(Ending { ended: self.now, way, retry_after, ..guest.ending });
    }

    /// Notes the state ten times a second.
    fn sample(&mut self) {
        const EVERY: Duration = Duration::from_millis(100);
        while self.sampled_at <= self.now {
            let gauges = self.scheduler.gauges();
            self.record.samples.push(Sample {
                at: self.sampled_at,
                queued: gauges.queued,
                queued_tokens: gauges.queued_tokens,
                served: self.served.clone(),
                waiting: self.waiting.clone(),
            });
            self.sampled_at = self.sampled_at.after(EVERY);
        }
    }
}

fn refusal_of(reason: FinishReason) -> Option<Refusal> {
    if let FinishReason::Refused(refusal) = reason { Some(refusal) } else { None }
}

fn way_of(refusal: Refusal) -> Way {
    match refusal {
        Refusal::QueueFull { .. } | Refusal::QueueTokens { .. } => Way::Full,
        Refusal::Shed { .. } => Way::Shed,
        Refusal::DeadlineUnreachable { .. } => Way::Unreachable,
        other => panic!("{other}"),
    }
}

/// When a source's next request comes.
fn following(rng: &mut Rng, source: &Source, now: Timestamp) -> Option<Timestamp> {
    // Uniform in (0, 1].
    let u = ((rng.draw() >> 11) + 1) as f64 / (1_u64 << 53) as f64;
    let at = now.after(Duration::from_secs_f64(-u.ln() / source.rate));
    let span = source.active.iter().find(|(_, until)| at < Timestamp::ZERO.after(*until))?;
    // In a pause the stream stands still; without memory that is to begin again after it.
    let begin = Timestamp::ZERO.after(span.0);
    Some(if at < begin { begin.after(at.since(now)) } else { at })
}
