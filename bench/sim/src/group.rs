//! A worker group of several shards and ranks under the shipped [`Shards`], for tests that tell a story: its
//! ranks answer in any order.
//!
//! Time stands still but for wake-ups; what happens next is the caller's choice. Invariant: what clients are
//! told is what the oracle says, and every rank has followed every plan.

use crate::client::Client;
use crate::ranks::Ranks;
use crate::replica::{full, limits};
use ids::{Bytes, Incarnation, Rank, RequestId, ShardId, Timestamp, Tokens};
use kv_cache::carve;
use scheduler::{
    Config, Divergence, Event, FinishReason, Output, Placement, PlanReport, Shards, Submit,
};
use std::collections::{BTreeMap, VecDeque};
use step::{Mesh, Outcome, StepPlan, ToWorker};

/// A group and its clients.
#[derive(Debug)]
pub struct Group {
    /// The schedulers.
    pub shards: Shards,
    /// Clients whose requests have not ended.
    pub clients: BTreeMap<RequestId, Client>,
    /// How requests ended.
    pub ends: BTreeMap<RequestId, FinishReason>,
    /// Requests that were turned away.
    pub refused: Vec<RequestId>,
    /// Where requests were placed, and why.
    pub placements: Vec<Placement>,
    /// Tokens of each shard in each step planned.
    pub steps: Vec<Vec<Tokens>>,
    /// Reports of every plan.
    pub reports: Vec<PlanReport>,
    /// Lives that the schedulers gave up.
    pub condemned: Vec<Incarnation>,
    /// Tokens that clients were told.
    pub tokens: u64,
    ranks: Ranks,
    /// By rank, on their way.
    answers: Vec<VecDeque<Outcome>>,
    now: Timestamp,
}

type Check<T = ()> = Result<T, String>;

impl Group {
    /// A group whose shards have `blocks` blocks each, with its first life begun.
    ///
    /// # Errors
    /// When something the schedulers say at once is wrong.
    ///
    /// # Panics
    /// When there is no such cache or group.
    pub fn new(mesh: Mesh, config: &Config, blocks: u64) -> Check<Self> {
        let groups = vec![full(0)];
        let carving = carve(&groups, Bytes(64 * blocks), Bytes(64)).expect("a cache of some size");
        let mut group = Self {
            shards: Shards::new(config, mesh.dp).expect("limits that agree"),
            clients: BTreeMap::new(),
            ends: BTreeMap::new(),
            refused: Vec::new(),
            placements: Vec::new(),
            steps: Vec::new(),
            reports: Vec::new(),
            condemned: Vec::new(),
            tokens: 0,
            ranks: Ranks::new(mesh, &groups, &carving, config.max_running),
            answers: mesh.ranks().map(|_| VecDeque::new()).collect(),
            now: Timestamp(1_000_000),
        };
        group.begin()?;
        Ok(group)
    }

    /// The same with [`limits`].
    ///
    /// # Errors
    /// As [`Group::new`].
    pub fn of(mesh: Mesh) -> Check<Self> {
        Self::new(mesh, &limits(), 64)
    }

    fn begin(&mut self) -> Check {
        self.answers.iter_mut().for_each(VecDeque::clear);
        let ready = self.ranks.begin();
        self.handle(Event::WorkerReady(Box::new(ready)))
    }

    /// Ends the life of every rank and begins the next.
    ///
    /// # Errors
    /// When what follows is wrong.
    pub fn die(&mut self) -> Check {
        self.ranks.end();
        self.handle(Event::WorkerLost(self.ranks.incarnation))?;
        self.begin()
    }

    /// Hands an event in, takes what is said, plans all that can be planned.
    ///
    /// # Errors
    /// At the first thing that is wrong.
    pub fn handle(&mut self, event: Event) -> Check {
        self.shards.handle(self.now, event);
        self.go_on()
    }

    /// Submits a request.
    ///
    /// # Errors
    /// When what follows is wrong.
    pub fn submit(&mut self, submit: Submit) -> Check {
        self.clients.insert(submit.request, Client::new(submit.clone(), None));
        self.handle(Event::Submit(Box::new(submit)))
    }

    /// Lets the client of a request leave.
    ///
    /// # Errors
    /// When what follows is wrong.
    pub fn abort(&mut self, request: RequestId) -> Check {
        if let Some(client) = self.clients.get_mut(&request) {
            client.asked.push(FinishReason::Aborted);
        }
        self.handle(Event::Abort(request))
    }

    /// Lets the oldest answer of a rank arrive, changed by `change`; whether that made a step whole. Ranks
    /// that disagree end the group: that is said, and nothing of the step was told.
    ///
    /// # Errors
    /// When what follows is wrong.
    pub fn arrive(
        &mut self,
        rank: Rank,
        change: impl FnOnce(&mut Outcome),
    ) -> Check<Result<bool, Divergence>> {
        let Some(mut answer) = self.answers[rank.index()].pop_front() else {
            return Ok(Ok(false));
        };
        change(&mut answer);
        let mut whole = false;
        if let Err(divergence) = self.ranks.heard(rank, answer) {
            return Ok(Err(divergence));
        }
        loop {
            match self.ranks.joined() {
                Ok(Some(joined)) => {
                    whole = true;
                    self.shards.retire(self.now, joined);
                    self.go_on()?;
                }
                Ok(None) => return Ok(Ok(whole)),
                Err(divergence) => return Ok(Err(divergence)),
            }
        }
    }

    /// Lets answers arrive, rank by rank, until every request has ended; `each` may end lives.
    ///
    /// # Errors
    /// When something is wrong, or a request never ends.
    pub fn drive(&mut self, mut each: impl FnMut(&mut Self) -> Check) -> Check {
        for _ in 0..20_000 {
            each(self)?;
            if self.clients.is_empty() {
                return self.settle();
            }
            for rank in self.ranks.mesh.ranks() {
                self.arrive(rank, |_| ())?.map_err(|divergence| divergence.to_string())?;
            }
            self.now = self.now.after(core::time::Duration::from_millis(10));
            if self.shards.next_wakeup().is_some_and(|at| at <= self.now) {
                self.handle(Event::Wakeup)?;
            }
        }
        Err(format!("requests never end: {:?}", self.shards.explain()))
    }

    /// Requests that run, by shard: the same in every rank of it.
    ///
    /// # Errors
    /// When ranks of a shard differ.
    pub fn seated(&self) -> Check<Vec<Vec<RequestId>>> {
        self.ranks.seated()
    }

    fn settle(&mut self) -> Check {
        // What is in flight retires, so that what was released can be counted.
        while self.answers.iter().any(|answers| !answers.is_empty()) {
            for rank in self.ranks.mesh.ranks() {
                self.arrive(rank, |_| ())?.map_err(|divergence| divergence.to_string())?;
            }
        }
        for cache in self.shards.schedulers().iter().filter_map(scheduler::Scheduler::cache) {
            cache.check().map_err(|imbalance| imbalance.to_string())?;
            let counts = cache.counts(ids::GroupId(0));
            if !(counts.owned + counts.shared + counts.limbo).is_zero() {
                return Err(format!("blocks are held at the end: {counts:?}"));
            }
        }
        Ok(())
    }

    fn go_on(&mut self) -> Check {
        self.drain()?;
        while let Some(planned) = self.shards.plan_step(self.now) {
            self.reports.push(planned.report);
            self.carry_out(planned.plan)?;
            self.drain()?;
        }
        self.drain()
    }

    fn carry_out(&mut self, plan: StepPlan) -> Check {
        self.steps.push(plan.shard_tokens.clone());
        let (outcomes, plan) = self.ranks.step(plan)?;
        self.shards.recycle(plan);
        for (rank, outcome) in self.ranks.mesh.ranks().zip(outcomes) {
            let answer = self.ranks.answer(rank, outcome);
            self.answers[rank.index()].push_back(answer);
        }
        Ok(())
    }

    fn drain(&mut self) -> Check {
        while let Some(placement) = self.shards.poll_placement() {
            self.placements.push(placement);
        }
        while let Some((shard, output)) = self.shards.poll_output() {
            self.receive(shard, output)?;
        }
        Ok(())
    }

    fn receive(&mut self, shard: ShardId, output: Output) -> Check {
        let client = |group: &mut Self, request| {
            group.clients.remove(&request).ok_or_else(|| format!("{request} had ended"))
        };
        match output {
            Output::Upload(upload) => self.ranks.command(shard, &ToWorker::Upload(upload)),
            Output::Forget(incarnation, request) => {
                self.ranks.command(shard, &ToWorker::Forget(incarnation, request))
            }
            Output::Started { request, cached } => {
                let mut client = client(self, request)?;
                let taken = client.started(cached);
                self.clients.insert(request, client);
                taken
            }
            Output::Token { request, token, .. } => {
                self.tokens += 1;
                let mut client = client(self, request)?;
                let taken = client.token(token);
                self.clients.insert(request, client);
                taken.map_err(|what| format!("{request}: {what}"))
            }
            Output::PromptLogprobs(part) => {
                Err(format!("{}: nobody asked for its prompt's", part.request))
            }
            Output::Finished { request, reason, usage } => {
                client(self, request)?
                    .finished(reason, usage)
                    .map_err(|what| format!("{request}: {what}"))?;
                self.ends.insert(request, reason);
                Ok(())
            }
            Output::Refused { request, .. } => {
                client(self, request)?;
                self.refused.push(request);
                Ok(())
            }
            Output::RestartWorker { incarnation, .. } => {
                self.condemned.push(incarnation);
                Ok(())
            }
        }
    }
}
