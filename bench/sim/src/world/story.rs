//! The journal of the run, told as the driver tells it, and held to what happened: each request's story must
//! add up to its time and name the steps that it ran in.
//!
//! It knows what ran from the workers, not from plans. Invariant: a story that the journal still holds whole
//! is checked when its request ends.

use super::Check;
use crate::client::Client;
use ids::{RequestId, ShardId, StepSeq, Timestamp, Tokens};
use scheduler::{
    Event, History, Joined, Journal, Output, Part, Placement, Planned, Role, Wait, Waits,
};
use std::collections::{BTreeMap, VecDeque};
use step::StepPlan;

/// Of worlds with one rank, one story in so many is read.
const ONE_IN: u64 = 4;

/// An end to look into.
#[derive(Debug)]
struct End {
    request: RequestId,
    arrival: Timestamp,
    prompt: Tokens,
    at: Timestamp,
    output: Tokens,
}

/// The journal and what it must say.
#[derive(Debug)]
pub(super) struct Story {
    journal: Journal,
    several: bool,
    homes: BTreeMap<RequestId, ShardId>,
    /// Who ran in each step that was not answered, oldest first.
    open: VecDeque<(StepSeq, Vec<(RequestId, Role)>)>,
    /// Answered steps of requests that have not ended.
    ran: BTreeMap<RequestId, Vec<(StepSeq, Role)>>,
    ended: Vec<End>,
}

impl Story {
    pub(super) fn new(slots: u32, shards: u32) -> Self {
        Self {
            journal: Journal::new(0, slots, u16::try_from(shards).unwrap_or(u16::MAX)),
            several: shards > 1,
            homes: BTreeMap::new(),
            open: VecDeque::new(),
            ran: BTreeMap::new(),
            ended: Vec::new(),
        }
    }

    /// An event is about to be handed over.
    pub(super) fn event(&mut self, now: Timestamp, event: &Event) {
        match event {
            // One that is submitted again is one.
            Event::Submit(submit) if !self.ran.contains_key(&submit.request) => {
                self.journal.submitted(submit);
                self.ran.insert(submit.request, Vec::new());
            }
            Event::WorkerReady(ready) => {
                self.open.clear();
                self.journal.ready(now, ready.incarnation);
            }
            Event::WorkerLost(_) => {
                self.open.clear();
                self.journal.lost(now);
            }
            Event::Submit(_)
            | Event::Outcome(_)
            | Event::Abort(_)
            | Event::Stop { .. }
            | Event::ForcePreempt(_)
            | Event::Wakeup => {}
        }
    }

    pub(super) fn placed(&mut self, placement: &Placement) {
        self.journal.placed(placement.request, placement.shard);
        self.homes.insert(placement.request, placement.shard);
    }

    pub(super) fn looked(&mut self, shard: ShardId, head: Option<(RequestId, Waits)>) {
        self.journal.looked(shard, head);
    }

    pub(super) fn planned(
        &mut self,
        now: Timestamp,
        planned: &Planned,
        stalls: &[(RequestId, Waits)],
    ) {
        self.journal.planned(now, planned, stalls);
    }

    pub(super) fn sent(&mut self, now: Timestamp, seq: StepSeq) {
        self.journal.sent(now, seq);
    }

    /// Who runs in the step that was just sent.
    pub(super) fn ran(&mut self, plan: &StepPlan, ran: impl Iterator<Item = (RequestId, Role)>) {
        self.open.push_back((plan.seq, ran.collect()));
    }

    /// A step's result is about to be handed over.
    pub(super) fn answered(&mut self, now: Timestamp, joined: &Joined) {
        let (life, seq) = (joined.incarnation, joined.seq);
        let timing = joined.outcomes.first().map(|outcome| outcome.timing).unwrap_or_default();
        self.journal.answered(now, life, seq, &timing);
        if self.open.front().is_none_or(|(due, _)| *due != seq) {
            return;
        }
        for (request, role) in self.open.pop_front().into_iter().flat_map(|(_, ran)| ran) {
            if let Some(steps) = self.ran.get_mut(&request) {
                steps.push((seq, role));
            }
        }
    }

    pub(super) fn said(&mut self, now: Timestamp, output: &Output) {
        self.journal.said(now, output);
        if let Output::Refused { request, .. } = output {
            self.ran.remove(request);
        }
    }

    pub(super) fn ended(&mut self, client: &Client, at: Timestamp, output: Tokens) {
        let (request, arrival) = (client.id(), client.submit.arrival);
        let prompt = Tokens(client.submit.prompt.len() as u32);
        self.ended.push(End { request, arrival, prompt, at, output });
    }

    /// Everything said was handed on: the stories of those who ended are looked into. How many were.
    pub(super) fn check(&mut self, now: Timestamp) -> Check<u64> {
        self.journal.delivered(now);
        let mut explained = 0;
        while let Some(end) = self.ended.pop() {
            let steps = self.ran.remove(&end.request).unwrap_or_default();
            if !self.several && end.request.0 % ONE_IN != 0 {
                continue;
            }
            let Ok(history) = self.journal.read(now).history(end.request) else { continue };
            if history.cut {
                continue;
            }
            explained += 1;
            self.adds_up(&end, &steps, &history)
                .map_err(|what| format!("the journal of {}: {what}: {history:?}", end.request))?;
        }
        Ok(explained)
    }

    fn adds_up(&self, end: &End, steps: &[(StepSeq, Role)], history: &History) -> Check {
        if (history.arrival, history.end) != (end.arrival, Some(end.at)) {
            return Err(format!("it lived from {:?} to {:?}", end.arrival, end.at));
        }
        let output = history.ending.map(|(_, output)| output);
        if (history.prompt, output) != (end.prompt, Some(end.output)) {
            return Err(format!("{} tokens after {}", end.output, end.prompt));
        }
        let mut cursor = history.arrival;
        for span in &history.spans {
            if span.from != cursor || span.to < span.from {
                return Err(format!("a part begins at {:?}, not at {cursor:?}", span.from));
            }
            cursor = span.to;
            // Who is in front of it is in its own shard.
            if let Part::Queued { wait: Wait::Behind { head, .. }, .. } = span.part
                && self.homes.get(&head) != self.homes.get(&end.request)
            {
                return Err(format!("it stood behind {head}, of another shard"));
            }
        }
        if cursor != end.at {
            return Err(format!("its parts end at {cursor:?}"));
        }
        let answered = history.steps.iter().filter(|step| step.answered.is_some() && !step.lost);
        let told: Vec<_> = answered.map(|step| (step.seq, step.role)).collect();
        if told != steps {
            return Err(format!("it ran in {steps:?}"));
        }
        Ok(())
    }
}
