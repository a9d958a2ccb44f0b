//! The stream between scheduler and worker, and what befalls it: everything travels as the bytes
//! of the protocol, outcomes late, early, twice, broken off, wrong, or never.
//!
//! It does not look into a plan. Invariant: what is decoded equals what was encoded, and bytes that
//! break off end the stream.

use super::{Check, Happening, World};
use crate::act::Act;
use crate::figures::Fault;
use crate::naive::Phase;
use crate::worker::Worker;
use core::time::Duration;
use ids::{Incarnation, StepSeq};
use scheduler::Event;
use std::sync::Arc;
use step::{Outcome, SampleFault, StepPlan, ToScheduler, ToWorker};

impl World {
    /// A message as the worker gets it.
    fn carry(&mut self, message: ToWorker) -> Check<ToWorker> {
        let mut bytes = Vec::new();
        wire::encode_to_worker(message.clone(), &mut bytes);
        self.figures.wire_bytes += bytes.len() as u64;
        let arrived = wire::decode_to_worker(&bytes).map_err(|error| error.to_string())?;
        if arrived != message {
            return Err(format!("on the wire {message:?} became {arrived:?}"));
        }
        Ok(arrived)
    }

    pub(super) fn carry_out(&mut self, plan: StepPlan) -> Check {
        // A dead worker's stream takes what is written to it and never answers.
        if self.worker.is_none() {
            return Ok(());
        }
        let ToWorker::Step(plan) = self.carry(ToWorker::Step(Arc::new(plan)))? else {
            return Err("a plan became another message".into());
        };
        let Some(worker) = &mut self.worker else { return Ok(()) };
        let outcome = worker.step(&plan, self.retired)?;
        let seated: Vec<_> = worker.seated().collect();
        if let Some(request) = seated.iter().find(|id| !self.clients.contains_key(id)) {
            return Err(format!("{request} ended and is in a later step"));
        }
        let poisoned = seated.into_iter().any(|request| self.poisons(request));
        self.figures.steps += 1;
        self.launched = plan.seq;
        self.count_full();
        self.travel(outcome, poisoned);
        Ok(())
    }

    /// How and when, if at all, an outcome gets back.
    fn travel(&mut self, mut outcome: Outcome, poisoned: bool) {
        let act = Act::Step(self.figures.steps);
        let mut rng = act.rng(self.scenario.seed);
        let (decode, prefill) =
            (outcome.timing.tokens - outcome.timing.prefill_tokens, outcome.timing.prefill_tokens);
        let ns = 2_000_000 + 100_000 * u64::from(decode) + 10_000 * u64::from(prefill);
        let ns = ns * (80 + rng.below(40)) / 100;
        outcome.timing.total_ns = ns;
        outcome.timing.model_ns = ns;
        self.busy_until = self.busy_until.max(self.now).after(Duration::from_nanos(ns));
        let mut delay = self.busy_until.since(self.now);
        if self.hung {
            return;
        }
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
        let has = |fault| faults.contains(&fault);
        let incarnation = self.incarnation;
        if has(Fault::Death) {
            self.after(delay * (rng.below(3) as u32) / 2, Happening::Die(incarnation));
        }
        if has(Fault::Lost) || has(Fault::Hung) {
            self.misbehaved = true;
            self.hung = has(Fault::Hung);
            return;
        }
        if has(Fault::Sample)
            && let Some(victim) = outcome.sampled.len().checked_sub(1)
        {
            let at = rng.below(victim as u64 + 1) as usize;
            outcome.sampled[at].fault = Some(SampleFault::NotANumber);
        }
        if has(Fault::Contradicting)
            && let Some(mut sampled) = outcome.sampled.pop()
        {
            self.misbehaved = true;
            if rng.one_in(2) {
                sampled.generation = sampled.generation.next();
                outcome.sampled.push(sampled);
            }
        }
        let deliver = |outcome: &Outcome| {
            let mut bytes = Vec::new();
            wire::encode_to_scheduler(ToScheduler::Outcome(outcome.clone()), &mut bytes);
            bytes
        };
        if has(Fault::UnknownStep) {
            let never = Outcome { seq: StepSeq(outcome.seq.0 + 100), ..outcome.clone() };
            self.after(delay, Happening::Deliver(incarnation, deliver(&never)));
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
            let again = Happening::Deliver(incarnation, bytes.clone());
            self.after(delay + Duration::from_nanos(ns), again);
        }
        self.after(delay, Happening::Deliver(incarnation, bytes));
    }

    pub(super) fn deliver(&mut self, from: Incarnation, bytes: Vec<u8>) -> Check {
        self.figures.wire_bytes += bytes.len() as u64;
        let outcome = match wire::decode_to_scheduler(&bytes) {
            Ok(ToScheduler::Outcome(outcome)) => outcome,
            Ok(other) => return Err(format!("an outcome became {other:?}")),
            // The driver closes the stream, which ends the worker.
            Err(_) => return self.die(from),
        };
        let due = self.retired.next();
        if outcome.incarnation == self.incarnation && self.worker.is_some() {
            if outcome.seq > due && outcome.seq <= self.launched {
                // The transport tries again, once what was missing is there.
                self.early.insert(outcome.seq, bytes);
            }
            if outcome.seq == due {
                // Taken, or a lie that ends this life.
                self.retired = due;
                if let Some(next) = self.early.remove(&due.next()) {
                    self.after(Duration::ZERO, Happening::Deliver(from, next));
                }
            }
        }
        self.handle(Event::Outcome(outcome))
    }

    /// Passes on what the scheduler says to the worker.
    pub(super) fn command(&mut self, message: ToWorker) -> Check {
        if self.worker.is_none() {
            return Ok(());
        }
        let arrived = self.carry(message)?;
        let Some(worker) = &mut self.worker else { return Ok(()) };
        match arrived {
            ToWorker::Upload(upload) => worker.upload(&upload),
            ToWorker::Forget(_, request) => {
                worker.forget(request);
                Ok(())
            }
            ToWorker::Configure(_) | ToWorker::Step(_) => Err("no such command".into()),
        }
    }

    /// A worker of the present life.
    pub(super) fn make_worker(&self) -> Worker {
        let scenario = &self.scenario;
        let slots = scenario.config.max_running;
        Worker::new(self.incarnation, &scenario.groups, &scenario.carving, slots)
    }
}
