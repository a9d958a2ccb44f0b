//! The processes of a worker group: a checking worker per rank, and what the control plane keeps of them
//! to hold them to each other: what each shard was told, and the [`Join`] of what they answer.
//!
//! Every command travels as the protocol's bytes. It delays and changes nothing; that is its caller's.
//! Invariants: what is decoded equals what was encoded; every rank of a shard is told the same.

use crate::worker::Worker;
use ids::{Incarnation, Rank, RequestId, ShardId, StepSeq};
use scheduler::{Divergence, Join, Joined, Role, WorkerReady};
use std::sync::Arc;
use step::{Carving, Digest, GroupSpec, Mesh, Outcome, StepPlan, ToWorker};

type Check<T = ()> = Result<T, String>;

/// One rank's process.
#[derive(Debug)]
struct Member {
    worker: Worker,
    told: Digest,
}

/// A group, one life after another.
#[derive(Debug)]
pub struct Ranks {
    /// Its shape.
    pub mesh: Mesh,
    /// The newest life.
    pub incarnation: Incarnation,
    /// The newest step sent in this life.
    pub launched: StepSeq,
    /// The newest step whose result the schedulers were told.
    pub retired: StepSeq,
    /// Bytes of commands, encoded and decoded.
    pub wire_bytes: u64,
    groups: Vec<GroupSpec>,
    carving: Carving,
    slots: u32,
    /// By rank; none while there is no group.
    members: Vec<Member>,
    /// What each shard was told in this life.
    told: Vec<Digest>,
    join: Join,
}

impl Ranks {
    /// No group yet.
    #[must_use]
    pub fn new(mesh: Mesh, groups: &[GroupSpec], carving: &Carving, slots: u32) -> Self {
        Self {
            mesh,
            incarnation: Incarnation(0),
            launched: StepSeq::ZERO,
            retired: StepSeq::ZERO,
            wire_bytes: 0,
            groups: groups.to_vec(),
            carving: carving.clone(),
            slots,
            members: Vec::new(),
            told: Vec::new(),
            join: Join::new(mesh),
        }
    }

    /// The next life begins.
    pub fn begin(&mut self) -> WorkerReady {
        self.incarnation = self.incarnation.next();
        (self.launched, self.retired) = (StepSeq::ZERO, StepSeq::ZERO);
        let member = |rank| Member {
            worker: Worker::new(self.incarnation, &self.groups, &self.carving, self.slots)
                .of_shard(self.mesh.shard(rank)),
            told: Digest::none(),
        };
        self.members = self.mesh.ranks().map(member).collect();
        self.told = self.mesh.shards().map(|_| Digest::none()).collect();
        self.join.begin(self.incarnation);
        let (groups, carving) = (self.groups.clone(), self.carving.clone());
        WorkerReady { incarnation: self.incarnation, groups, carving }
    }

    /// Ends the life; whether there was one.
    pub fn end(&mut self) -> bool {
        let alive = self.alive();
        self.members.clear();
        alive
    }

    /// Whether there is a group.
    #[must_use]
    pub fn alive(&self) -> bool {
        !self.members.is_empty()
    }

    /// A message as the workers get it.
    fn carry(&mut self, message: &ToWorker) -> Check<ToWorker> {
        let mut bytes = Vec::new();
        wire::encode_to_worker(message.clone(), &mut bytes);
        self.wire_bytes += bytes.len() as u64;
        let arrived = wire::decode_to_worker(&bytes).map_err(|error| error.to_string())?;
        if arrived != *message {
            return Err(format!("on the wire {message:?} became {arrived:?}"));
        }
        Ok(arrived)
    }

    /// Tells the ranks of a shard what concerns a request.
    ///
    /// # Errors
    /// When it does not continue what they were told.
    pub fn command(&mut self, shard: ShardId, message: &ToWorker) -> Check {
        if !self.alive() {
            return Ok(());
        }
        self.told[shard.index()].take(message);
        let arrived = self.carry(message)?;
        for rank in self.mesh.members(shard) {
            let member = &mut self.members[rank.index()];
            member.told.take(&arrived);
            match &arrived {
                ToWorker::Upload(upload) => member.worker.upload(upload)?,
                ToWorker::Forget(_, request) => member.worker.forget(*request),
                ToWorker::Configure(_) | ToWorker::Step(_) => return Err("no such command".into()),
            }
        }
        Ok(())
    }

    /// Sends a plan to every rank. Returns what each of them finds, by rank, and the plan.
    ///
    /// # Errors
    /// The first thing in the plan that is not safe or not possible.
    pub fn step(&mut self, plan: StepPlan) -> Check<(Vec<Outcome>, StepPlan)> {
        let message = ToWorker::Step(Arc::new(plan));
        self.told.iter_mut().for_each(|told| told.take(&message));
        let arrived = self.carry(&message)?;
        let (ToWorker::Step(sent), ToWorker::Step(plan)) = (message, &arrived) else {
            return Err("a plan became another message".into());
        };
        if plan.sections.len() != self.mesh.dp as usize {
            return Err("not a section per shard".into());
        }
        self.launched = plan.seq;
        self.join.sent(plan.seq, &self.told);
        let mut outcomes = Vec::with_capacity(self.members.len());
        for member in &mut self.members {
            member.told.take(&arrived);
            outcomes.push(member.worker.step(plan, self.retired)?);
        }
        let sent = Arc::try_unwrap(sent).map_err(|_| "a plan is still on its way".to_owned())?;
        Ok((outcomes, sent))
    }

    /// What a rank says of the newest step, having found this: samples are for the lead to tell, a digest
    /// for everyone.
    #[must_use]
    pub fn answer(&self, rank: Rank, mut outcome: Outcome) -> Outcome {
        if let Some(member) = self.members.get(rank.index()) {
            outcome.digest = member.told.with_sampled(&outcome.sampled);
        }
        if self.mesh.lead(self.mesh.shard(rank)) != rank {
            outcome.sampled.clear();
            outcome.prompt_logprobs.clear();
        }
        outcome
    }

    /// Takes a rank's answer.
    ///
    /// # Errors
    /// When it answers what it was not asked.
    pub fn heard(&mut self, rank: Rank, outcome: Outcome) -> Result<(), Divergence> {
        self.join.heard(rank, outcome)
    }

    /// The next step that every rank has answered alike.
    ///
    /// # Errors
    /// When they did not answer it alike.
    pub fn joined(&mut self) -> Result<Option<Joined>, Divergence> {
        let joined = self.join.whole()?;
        if let Some(joined) = &joined {
            self.retired = joined.seq;
        }
        Ok(joined)
    }

    /// The oldest step without all its answers, and the ranks that owe theirs.
    #[must_use]
    pub fn missing(&self) -> Option<(StepSeq, Vec<Rank>)> {
        self.join.missing()
    }

    /// Requests that have a slot, by shard: the same in every rank of it.
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

    /// Who ran in the newest step, in all shards.
    pub fn ran(&self) -> impl Iterator<Item = (RequestId, Role)> {
        let leads = self.mesh.shards().filter_map(|shard| {
            let lead = self.mesh.lead(shard);
            self.members.get(lead.index())
        });
        leads.flat_map(|member| member.worker.ran().iter().copied())
    }
}
