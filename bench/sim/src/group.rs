//! A worker group of several shards and ranks under the shipped [`Shards`] and [`Join`]: a checking worker per
//! rank, each with a stream of its own, whose answers come in any order.
//!
//! Time stands still but for wake-ups; what happens next is the caller's choice. Invariant: what clients are
//! told is what the oracle says, and every rank has followed every plan.

use crate::client::Client;
use crate::replica::{full, limits};
use crate::worker::Worker;
use ids::{Bytes, Incarnation, Rank, RequestId, ShardId, StepSeq, Timestamp, Tokens};
use kv_cache::carve;
use scheduler::{
    Config, Divergence, Event, FinishReason, Join, Output, Placement, PlanReport, Shards, Submit,
    WorkerReady,
};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use step::{Carving, Digest, GroupSpec, Mesh, Outcome, StepPlan, StepTiming, ToWorker};

/// One rank's process.
#[derive(Debug)]
struct Member {
    worker: Worker,
    told: Digest,
    /// Plans of its shard that it carried out, which its worker numbers itself.
    plans: u64,
    answers: VecDeque<Outcome>,
}

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
    mesh: Mesh,
    join: Join,
    members: Vec<Member>,
    told: Vec<Digest>,
    /// Steps of each shard that the schedulers know the result of.
    retired: Vec<StepSeq>,
    groups: Vec<GroupSpec>,
    carving: Carving,
    incarnation: Incarnation,
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
            mesh,
            join: Join::new(mesh),
            members: Vec::new(),
            told: Vec::new(),
            retired: Vec::new(),
            groups,
            carving,
            incarnation: Incarnation(0),
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
        self.incarnation = self.incarnation.next();
        let slots = self.shards.schedulers()[0].config().max_running;
        let member = |_| Member {
            worker: Worker::new(self.incarnation, &self.groups, &self.carving, slots),
            told: Digest::none(),
            plans: 0,
            answers: VecDeque::new(),
        };
        self.members = self.mesh.ranks().map(member).collect();
        self.told = self.mesh.shards().map(|_| Digest::none()).collect();
        self.retired = self.mesh.shards().map(|_| StepSeq::ZERO).collect();
        self.join.begin(self.incarnation);
        let (groups, carving) = (self.groups.clone(), self.carving.clone());
        let ready = WorkerReady { incarnation: self.incarnation, groups, carving };
        self.handle(Event::WorkerReady(Box::new(ready)))
    }

    /// Ends the life of every rank and begins the next.
    ///
    /// # Errors
    /// When what follows is wrong.
    pub fn die(&mut self) -> Check {
        self.members.clear();
        self.handle(Event::WorkerLost(self.incarnation))?;
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

    /// Whether a rank has an answer on its way.
    #[must_use]
    pub fn has_answer(&self, rank: Rank) -> bool {
        self.members.get(rank.index()).is_some_and(|member| !member.answers.is_empty())
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
        let Some(mut answer) = self.members[rank.index()].answers.pop_front() else {
            return Ok(Ok(false));
        };
        change(&mut answer);
        let tokens = self.tokens;
        let mut whole = false;
        if let Err(divergence) = self.join.heard(rank, answer) {
            return Ok(Err(divergence));
        }
        loop {
            match self.join.whole() {
                Ok(Some(joined)) => {
                    whole = true;
                    for (retired, outcome) in self.retired.iter_mut().zip(&joined.outcomes) {
                        if outcome.timing.tokens > 0 {
                            *retired = retired.next();
                        }
                    }
                    self.shards.retire(self.now, joined);
                    self.go_on()?;
                }
                Ok(None) => return Ok(Ok(whole)),
                Err(divergence) if self.tokens == tokens || whole => return Ok(Err(divergence)),
                Err(divergence) => {
                    return Err(format!("told before it was compared: {divergence}"));
                }
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
            for rank in self.mesh.ranks() {
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
        let of = |rank: Rank| -> Vec<RequestId> {
            self.members.get(rank.index()).map(|m| m.worker.seated().collect()).unwrap_or_default()
        };
        let mut all = Vec::new();
        for shard in self.mesh.shards() {
            let seated = of(self.mesh.lead(shard));
            if self.mesh.members(shard).any(|rank| of(rank) != seated) {
                return Err(format!("ranks of shard {shard} have other requests"));
            }
            all.push(seated);
        }
        Ok(all)
    }

    fn settle(&mut self) -> Check {
        // What is in flight retires, so that what was released can be counted.
        while self.mesh.ranks().any(|rank| self.has_answer(rank)) {
            for rank in self.mesh.ranks() {
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
        if plan.sections.len() != self.mesh.dp as usize {
            return Err("not a section per shard".into());
        }
        let most = plan.shard_tokens.iter().max().copied().unwrap_or_default();
        if plan.bucket < most || most.is_zero() {
            return Err(format!("bucket {} for {:?}", plan.bucket, plan.shard_tokens));
        }
        self.steps.push(plan.shard_tokens.clone());
        let command = ToWorker::Step(Arc::new(plan));
        self.told.iter_mut().for_each(|told| told.take(&command));
        let ToWorker::Step(plan) = &command else { return Ok(()) };
        self.join.sent(plan.seq, &self.told);
        for (rank, member) in self.mesh.ranks().zip(&mut self.members) {
            let shard = self.mesh.shard(rank);
            let (section, tokens) =
                (&plan.sections[shard.index()], plan.shard_tokens[shard.index()]);
            member.told.take(&command);
            let mut outcome = if tokens.is_zero() {
                member.worker.stand_still(section, self.retired[shard.index()])?;
                nothing(plan)
            } else {
                member.plans += 1;
                let own = StepPlan {
                    seq: StepSeq(member.plans),
                    incarnation: plan.incarnation,
                    bucket: plan.bucket,
                    shard_tokens: vec![tokens],
                    sections: vec![section.clone()],
                };
                member.worker.step(&own, self.retired[shard.index()])?
            };
            outcome.seq = plan.seq;
            outcome.digest = member.told.with_sampled(&outcome.sampled);
            if self.mesh.lead(shard) != rank {
                outcome.sampled.clear();
                outcome.prompt_logprobs.clear();
            }
            member.answers.push_back(outcome);
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

    fn command(&mut self, shard: ShardId, command: &ToWorker) -> Check {
        self.told[shard.index()].take(command);
        for rank in self.mesh.members(shard) {
            let Some(member) = self.members.get_mut(rank.index()) else { continue };
            member.told.take(command);
            match command {
                ToWorker::Upload(upload) => member.worker.upload(upload)?,
                ToWorker::Forget(_, request) => member.worker.forget(*request),
                ToWorker::Configure(_) | ToWorker::Step(_) => {}
            }
        }
        Ok(())
    }

    fn receive(&mut self, shard: ShardId, output: Output) -> Check {
        let client = |group: &mut Self, request| {
            group.clients.remove(&request).ok_or_else(|| format!("{request} had ended"))
        };
        match output {
            Output::Upload(upload) => self.command(shard, &ToWorker::Upload(upload)),
            Output::Forget(incarnation, request) => {
                self.command(shard, &ToWorker::Forget(incarnation, request))
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

/// What a rank says of a step in which its shard has no work.
fn nothing(plan: &StepPlan) -> Outcome {
    Outcome {
        seq: plan.seq,
        incarnation: plan.incarnation,
        sampled: Vec::new(),
        prompt_logprobs: Vec::new(),
        timing: StepTiming::default(),
        digest: 0,
    }
}
