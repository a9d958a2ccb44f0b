//! The streams between schedulers and ranks, and what befalls them: everything travels as the bytes
//! of the protocol, outcomes late, early, twice, broken off, wrong, or never.
//!
//! It does not look into a plan. Invariant: bytes that break off end the stream; no step comes out about
//! which a rank lied, and no rank that did not is said to differ.

use super::{Check, Happening, World};
use crate::act::Act;
use crate::figures::Fault;
use crate::naive::Phase;
use crate::rng::Rng;
use core::time::Duration;
use ids::{Incarnation, Rank, SlotGeneration, SlotId, StepSeq, TokenId};
use scheduler::{Divergence, Joined};
use step::{Outcome, SampleFault, Sampled, StepPlan, ToScheduler};

impl World {
    pub(super) fn carry_out(&mut self, plan: StepPlan) -> Check {
        self.story.sent(self.now, plan.seq);
        // A dead worker's stream takes what is written to it and never answers.
        if !self.ranks.alive() {
            return Ok(());
        }
        let still = plan.shard_tokens.iter().filter(|tokens| tokens.is_zero()).count();
        self.figures.still += still as u64;
        let (outcomes, plan) = self.ranks.step(plan)?;
        self.story.ran(&plan, self.ranks.ran());
        self.sent.push_back(plan);
        let seated: Vec<_> = self.ranks.seated()?.into_iter().flatten().collect();
        if let Some(request) = seated.iter().find(|id| !self.clients.contains_key(id)) {
            return Err(format!("{request} ended and is in a later step"));
        }
        if self.scenario.compared
            && seated.len() > 1
            && self.model.shards().iter().any(|shard| shard.runs_alone())
        {
            return Err(format!("one that killed workers is not alone: {seated:?}"));
        }
        let poisoned = seated.into_iter().any(|request| self.poisons(request));
        self.figures.steps += 1;
        self.count_full();
        self.travel(outcomes, poisoned);
        Ok(())
    }

    /// How and when, if at all, outcomes get back.
    fn travel(&mut self, mut outcomes: Vec<Outcome>, poisoned: bool) {
        let act = Act::Step(self.figures.steps);
        let mut rng = act.rng(self.scenario.seed);
        // Ranks run in lockstep: the shard with most to do is what all wait for.
        let load = |outcome: &Outcome| {
            let (tokens, prefill) = (outcome.timing.tokens, outcome.timing.prefill_tokens);
            100_000 * u64::from(tokens - prefill) + 10_000 * u64::from(prefill)
        };
        let ns = 2_000_000 + outcomes.iter().map(load).max().unwrap_or(0);
        let ns = ns * (80 + rng.below(40)) / 100;
        for outcome in &mut outcomes {
            (outcome.timing.total_ns, outcome.timing.model_ns) = (ns, ns);
        }
        self.busy_until = self.busy_until.max(self.now).after(Duration::from_nanos(ns));
        let delay = self.busy_until.since(self.now);
        let faults =
            if self.hung.is_some() { Vec::new() } else { self.faults(act, &mut rng, poisoned) };
        let has = |fault| faults.contains(&fault);
        let incarnation = self.ranks.incarnation;
        if has(Fault::Death) {
            self.after(delay * (rng.below(3) as u32) / 2, Happening::Die(incarnation));
        }
        let mesh = self.scenario.mesh;
        let victim = Rank(rng.below_among(outcomes.len()));
        let shard = mesh.shard(victim);
        let lead = mesh.lead(shard);
        if has(Fault::Sample)
            && let Some(last) = outcomes[victim.index()].sampled.len().checked_sub(1)
        {
            let at = rng.below(last as u64 + 1) as usize;
            for rank in mesh.members(shard) {
                outcomes[rank.index()].sampled[at].fault = Some(SampleFault::NotANumber);
            }
        }
        let seq = outcomes[victim.index()].seq;
        let mut answers: Vec<Outcome> = mesh
            .ranks()
            .zip(outcomes)
            .map(|(rank, outcome)| self.ranks.answer(rank, outcome))
            .collect();
        if has(Fault::Contradicting) {
            self.contradict(&mut answers[lead.index()], lead, &mut rng);
        }
        if has(Fault::Digest) {
            self.misbehaved = true;
            answers[victim.index()].digest ^= 1 << rng.below(64);
            self.lied.entry(seq).or_default().push(victim);
        }
        if has(Fault::Lost) || has(Fault::Hung) {
            self.misbehaved = true;
        }
        if has(Fault::Hung) {
            self.hung = Some(victim);
        }
        // In a group whoever says what it was not asked is not trusted any more.
        self.misbehaved |=
            self.scenario.joined && (has(Fault::Repeated) || has(Fault::UnknownStep));
        let silent = self.hung.or(Some(victim).filter(|_| has(Fault::Lost)));
        let several = answers.len() > 1;
        for (rank, outcome) in mesh.ranks().zip(answers).filter(|(rank, _)| Some(*rank) != silent) {
            let has = |fault| has(fault) && rank == victim;
            let jitter = if several { rng.below(ns / 4) } else { 0 };
            let mut delay = delay + Duration::from_nanos(jitter);
            let deliver = |outcome: &Outcome| {
                let mut bytes = Vec::new();
                wire::encode_to_scheduler(ToScheduler::Outcome(outcome.clone()), &mut bytes);
                bytes
            };
            if has(Fault::UnknownStep) {
                let never = Outcome { seq: StepSeq(outcome.seq.0 + 100), ..outcome.clone() };
                self.after(delay, Happening::Deliver(incarnation, rank, deliver(&never)));
            }
            if has(Fault::Reordered) {
                delay += Duration::from_nanos(3 * ns);
            }
            if has(Fault::Late) {
                delay += Duration::from_millis(300);
            }
            let mut bytes = deliver(&outcome);
            if has(Fault::Garbled) {
                bytes.truncate(rng.below(bytes.len() as u64) as usize);
            }
            if has(Fault::Repeated) {
                let again = Happening::Deliver(incarnation, rank, bytes.clone());
                self.after(delay + Duration::from_nanos(ns), again);
            }
            self.after(delay, Happening::Deliver(incarnation, rank, bytes));
        }
    }

    /// What befalls the outcomes of a step.
    fn faults(&mut self, act: Act, rng: &mut Rng, poisoned: bool) -> Vec<Fault> {
        let s = &self.scenario;
        // Lies are told where they hurt most: while a slot waits for its last step.
        let closing = !self.model.in_phase(Phase::Closing).is_empty();
        let lies = if closing { s.lies.div_ceil(40) } else { s.lies };
        let rates = [
            (Fault::Late, s.lates),
            (Fault::Lost, s.losses),
            (Fault::Repeated, s.repeats),
            (Fault::Reordered, s.reorders),
            (Fault::Contradicting, lies),
            (Fault::UnknownStep, s.lies),
            (Fault::Garbled, s.garbles),
            (Fault::Sample, s.sample_faults),
            (Fault::Hung, s.hangs),
            (Fault::Death, s.deaths),
            (Fault::Digest, s.digests),
        ];
        let mut faults: Vec<Fault> = Vec::new();
        faults.extend(rates.iter().filter(|(_, n)| rng.one_in(*n)).map(|(fault, _)| *fault));
        if !self.open() || faults.is_empty() || !self.acts(act) {
            faults.clear();
        }
        if poisoned && !faults.contains(&Fault::Death) {
            faults.push(Fault::Death);
        }
        faults.iter().for_each(|fault| self.figures.faults[*fault as usize] += 1);
        faults
    }

    /// Makes a lead's outcome contradict its plan; of a group that may show in its digest or not.
    fn contradict(&mut self, outcome: &mut Outcome, lead: Rank, rng: &mut Rng) {
        match outcome.sampled.pop() {
            Some(mut sampled) => {
                if rng.one_in(2) {
                    sampled.generation = sampled.generation.next();
                    outcome.sampled.push(sampled);
                }
            }
            // Of a shard that stood still as well.
            None if self.scenario.joined => {
                let (slot, generation, token) = (SlotId(0), SlotGeneration(1), TokenId(1));
                outcome.sampled.push(Sampled {
                    slot,
                    generation,
                    token,
                    fault: None,
                    logprobs: None,
                });
            }
            None => return,
        }
        self.misbehaved = true;
        if !self.scenario.joined {
            return;
        }
        if !rng.one_in(8) {
            *outcome = self.ranks.answer(lead, outcome.clone());
        }
        let alone = self.scenario.mesh.tp == 1
            && outcome.digest == self.ranks.answer(lead, outcome.clone()).digest;
        if !alone {
            self.lied.entry(outcome.seq).or_default().push(lead);
        }
    }

    pub(super) fn deliver(&mut self, from: Incarnation, rank: Rank, bytes: Vec<u8>) -> Check {
        self.figures.wire_bytes += bytes.len() as u64;
        let outcome = match wire::decode_to_scheduler(&bytes) {
            Ok(ToScheduler::Outcome(outcome)) => outcome,
            Ok(other) => return Err(format!("an outcome became {other:?}")),
            // The driver closes the stream, which ends the worker.
            Err(_) => return self.die(from),
        };
        if self.scenario.joined {
            return self.join(from, rank, outcome);
        }
        let due = self.ranks.retired.next();
        if outcome.incarnation == self.ranks.incarnation && self.ranks.alive() {
            if outcome.seq > due && outcome.seq <= self.ranks.launched {
                // The transport tries again, once what was missing is there.
                self.early.insert(outcome.seq, bytes);
            }
            if outcome.seq == due {
                // Taken, or a lie that ends this life.
                self.ranks.retired = due;
                if let Some(next) = self.early.remove(&due.next()) {
                    self.after(Duration::ZERO, Happening::Deliver(from, rank, next));
                }
            }
        }
        let (seq, incarnation) = (outcome.seq, outcome.incarnation);
        self.retire(Joined { seq, incarnation, outcomes: vec![outcome] })?;
        self.go_on()
    }

    /// Takes a rank's answer as the driver does: steps count once all have answered alike.
    fn join(&mut self, from: Incarnation, rank: Rank, outcome: Outcome) -> Check {
        // The streams of a life end with it, and of ranks that disagree none is listened to.
        if from != self.ranks.incarnation || !self.ranks.alive() || self.diverged {
            return Ok(());
        }
        if let Err(divergence) = self.ranks.heard(rank, outcome) {
            return self.diverge(&divergence);
        }
        loop {
            match self.ranks.joined() {
                Ok(Some(joined)) => {
                    if let Some(ranks) = self.lied.get(&joined.seq) {
                        return Err(format!("step {} came out; {ranks:?} lied", joined.seq));
                    }
                    self.retire(joined)?;
                }
                Ok(None) => return self.go_on(),
                Err(divergence) => {
                    self.diverge(&divergence)?;
                    return self.go_on();
                }
            }
        }
    }

    fn diverge(&mut self, divergence: &Divergence) -> Check {
        if !self.misbehaved {
            return Err(format!("honest ranks are said to disagree: {divergence}"));
        }
        if let Divergence::Digest { seq, shard, ranks, .. } = divergence {
            let mesh = self.scenario.mesh;
            // Of two that tell different things the one that leads is believed.
            let found = |liar: &Rank| {
                let leads = mesh.shard(*liar) == *shard && mesh.lead(*shard) == *liar;
                ranks.contains(liar) || leads
            };
            let liars = self.lied.get(seq);
            if !liars.is_some_and(|liars| liars.iter().any(found)) {
                return Err(format!("{divergence}, but who lied are {liars:?}"));
            }
        }
        self.diverged = true;
        self.figures.divergences += 1;
        self.after(Duration::from_millis(1), Happening::Die(self.ranks.incarnation));
        Ok(())
    }
}
