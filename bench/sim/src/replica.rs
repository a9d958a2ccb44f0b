//! One scheduler and one worker in lockstep, without time or faults: for tests that tell a story.
//!
//! Every plan is carried out by the checking worker. Outcomes are handed back only when nothing
//! more can be planned, so that the scheduler runs as far ahead as it may.
//! Invariant: `drive` returns only when every request has ended.

use crate::client::END;
use crate::worker::Worker;
use core::time::Duration;
use ids::{
    Bytes, GroupId, HashKey, Incarnation, RequestId, StepSeq, TenantId, Timestamp, TokenId, Tokens,
};
use kv_cache::carve;
use scheduler::{
    Config, Event, FinishReason, Output, PlanReport, Refusal, Scheduler, Submit, Usage, WorkerReady,
};
use std::collections::{BTreeMap, VecDeque};
use step::{GroupKind, GroupSpec, Outcome, Sampling};

/// Steps after which a story that does not end has failed.
const STEPS_MOST: u64 = 100_000;

/// What became of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Told {
    /// Output tokens.
    pub tokens: Vec<TokenId>,
    /// Prompt tokens found in the cache.
    pub cached: Option<Tokens>,
    /// Positions of the prompt whose log-probabilities came.
    pub prompt_logprobs: u32,
    /// Its end.
    pub end: Option<(FinishReason, Usage)>,
    /// Why it was not accepted.
    pub refused: Option<Refusal>,
}

/// A scheduler with its worker.
pub struct Replica {
    /// The scheduler.
    pub scheduler: Scheduler,
    /// The time, which every step moves by 10 ms.
    pub now: Timestamp,
    /// What clients were told.
    pub told: BTreeMap<RequestId, Told>,
    /// Reports of every plan.
    pub reports: Vec<PlanReport>,
    /// Lives whose worker the scheduler gave up.
    pub condemned: Vec<Incarnation>,
    /// How long a step takes, by decoding slots and prompt tokens; no time when left out.
    pub cost: Option<fn(u32, u32) -> Duration>,
    worker: Worker,
    groups: Vec<GroupSpec>,
    blocks: u64,
    incarnation: Incarnation,
    retired: StepSeq,
    outcomes: VecDeque<Outcome>,
}

/// A full-attention group with blocks of 64 bytes.
#[must_use]
pub fn full(group: u8) -> GroupSpec {
    GroupSpec { group: GroupId(group), kind: GroupKind::Full, block_bytes: Bytes(64) }
}

/// A sliding-window group with blocks of 64 bytes.
#[must_use]
pub fn sliding(group: u8, window: u32) -> GroupSpec {
    let kind = GroupKind::Sliding { window: Tokens(window) };
    GroupSpec { group: GroupId(group), kind, block_bytes: Bytes(64) }
}

/// Limits that bind nothing a story does not speak of.
#[must_use]
pub fn limits() -> Config {
    Config { max_running: 8, max_context: Tokens(4096), ..Config::with_key(key()) }
}

fn key() -> HashKey {
    HashKey::derive("stories", b"")
}

/// A greedy request for `max_tokens` tokens after `prompt` distinct ones.
#[must_use]
pub fn request(id: u64, prompt: u32, max_tokens: u32) -> Submit {
    let prompt: Vec<_> = (0..prompt).map(|i| TokenId(1 + (i * 7 + i / 90) % 96)).collect();
    let root = key().root(b"");
    Submit {
        request: RequestId(id),
        prompt_hashes: key().chain_all(root, &prompt).into(),
        prompt: prompt.into(),
        root,
        sampling: Sampling::default().into(),
        max_tokens: Tokens(max_tokens),
        end_tokens: [END].into(),
        ignore_eos: true,
        stop_tokens: [].into(),
        prompt_logprobs: None,
        priority: 0,
        tenant: TenantId(0),
        deadline: None,
        arrival: Timestamp(id),
    }
}

impl Replica {
    /// A replica whose cache holds `blocks` blocks of 64 bytes.
    ///
    /// # Panics
    /// When the story's limits or groups make no sense.
    #[must_use]
    pub fn new(config: Config, groups: &[GroupSpec], blocks: u64) -> Self {
        let slots = config.max_running;
        let carving = carve(groups, Bytes(64 * blocks), Bytes(64)).expect("a cache of some size");
        let incarnation = Incarnation(1);
        let mut replica = Self {
            scheduler: Scheduler::new(config).expect("limits that agree"),
            now: Timestamp(1_000_000),
            told: BTreeMap::new(),
            reports: Vec::new(),
            condemned: Vec::new(),
            cost: None,
            worker: Worker::new(incarnation, groups, &carving, slots),
            groups: groups.to_vec(),
            blocks,
            incarnation: Incarnation(0),
            retired: StepSeq::ZERO,
            outcomes: VecDeque::new(),
        };
        replica.begin_life();
        replica
    }

    /// Hands in an event and takes what is said.
    pub fn handle(&mut self, event: Event) {
        self.scheduler.handle(self.now, event);
        self.drain();
    }

    /// Submits a request.
    pub fn submit(&mut self, submit: Submit) {
        self.told.insert(submit.request, Told::default());
        self.handle(Event::Submit(Box::new(submit)));
    }

    /// Plans all that can be planned and carries it out.
    ///
    /// # Panics
    /// When a plan is not safe.
    pub fn plan(&mut self) {
        while let Some(planned) = self.scheduler.plan_step(self.now) {
            let outcome = self.worker.step(&planned.plan, self.retired);
            let mut outcome = outcome.expect("a plan that is safe");
            if let Some(cost) = self.cost {
                let timing = &mut outcome.timing;
                let decode = timing.tokens - timing.prefill_tokens;
                timing.total_ns = cost(decode, timing.prefill_tokens).as_nanos() as u64;
            }
            self.outcomes.push_back(outcome);
            self.reports.push(planned.report);
            self.drain();
            self.now = self.now.after(Duration::from_millis(10));
        }
        self.drain();
    }

    /// Hands back the oldest outcome, if there is one.
    pub fn retire(&mut self) -> bool {
        let Some(outcome) = self.outcomes.pop_front() else { return false };
        self.retired = outcome.seq;
        self.handle(Event::Outcome(outcome));
        true
    }

    /// Kills the worker; a new one takes its place.
    pub fn die(&mut self) {
        self.handle(Event::WorkerLost(self.incarnation));
        self.begin_life();
    }

    /// Runs until every request has ended; `each` sees the replica before each outcome.
    ///
    /// # Panics
    /// When that takes too long or leaves blocks behind.
    pub fn drive(&mut self, mut each: impl FnMut(&mut Self, u64)) {
        for step in 0..STEPS_MOST {
            self.plan();
            each(self, step);
            self.plan();
            if self.outcomes.is_empty() && self.live() == 0 {
                let cache = self.scheduler.cache().expect("a life");
                cache.check().expect("a cache that adds up");
                for i in 0..cache.groups() {
                    let counts = cache.counts(GroupId(i as u8));
                    assert!((counts.owned + counts.shared + counts.limbo).is_zero(), "{counts:?}");
                }
                return;
            }
            self.retire();
        }
        panic!("a request never ends: {:?}", self.scheduler.explain());
    }

    /// Requests that have a slot in the worker.
    #[must_use]
    pub fn seated(&self) -> Vec<RequestId> {
        self.worker.seated().collect()
    }

    /// Requests that have not ended.
    #[must_use]
    pub fn live(&self) -> usize {
        self.told.values().filter(|told| told.end.is_none() && told.refused.is_none()).count()
    }

    fn begin_life(&mut self) {
        self.incarnation = self.incarnation.next();
        self.retired = StepSeq::ZERO;
        self.outcomes.clear();
        let groups = self.groups.clone();
        let carving = carve(&groups, Bytes(64 * self.blocks), Bytes(64)).expect("as before");
        let slots = self.scheduler.config().max_running;
        self.worker = Worker::new(self.incarnation, &groups, &carving, slots);
        let ready = WorkerReady { incarnation: self.incarnation, groups, carving };
        self.handle(Event::WorkerReady(Box::new(ready)));
    }

    fn drain(&mut self) {
        while let Some(output) = self.scheduler.poll_output() {
            match output {
                Output::Upload(upload) => self.worker.upload(&upload).expect("tokens in order"),
                Output::Forget(_, request) => self.worker.forget(request),
                Output::Started { request, cached } => self.told(request).cached = Some(cached),
                Output::Token { request, token, .. } => self.told(request).tokens.push(token),
                Output::PromptLogprobs(part) => {
                    let told = self.told(part.request);
                    assert_eq!(part.first.0, told.prompt_logprobs + 1, "parts in order");
                    told.prompt_logprobs += part.entries.len() as u32;
                }
                Output::Finished { request, reason, usage } => {
                    let end = &mut self.told(request).end;
                    assert!(end.replace((reason, usage)).is_none(), "{request} ended twice");
                }
                Output::Refused { request, reason } => self.told(request).refused = Some(reason),
                Output::RestartWorker { incarnation, .. } => self.condemned.push(incarnation),
            }
        }
    }

    fn told(&mut self, request: RequestId) -> &mut Told {
        self.told.get_mut(&request).expect("a request of this story")
    }
}
