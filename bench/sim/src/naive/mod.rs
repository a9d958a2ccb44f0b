//! What the scheduler must do, said in the most obvious way: one list of requests, filtered and
//! sorted whenever somebody asks who runs and who waits; blocks found by their tokens.
//!
//! Written apart from the scheduler and slower by far. It shares the types of the protocol, the
//! limits, and one thing that decides: the cost model's fit, whose floats would differ in the last
//! bit if they were summed in another order, and which has its own tests. It knows one tenant, no
//! patience, no deadline out of reach: what is fair among tenants has its own tests. The simulated
//! world hands every event to both and compares every refusal, output, wake-up and plan.
//! Invariant: nothing here is kept that can be counted from the list.

mod cache;
mod door;
mod group;
mod life;
mod outcome;
mod place;
mod plan;

pub use group::Group;

use cache::Table;
use core::time::Duration;
use door::limit;
use ids::{Incarnation, RequestId, SlotId, StepSeq, Timestamp, TokenId, Tokens};
use life::Life;
use scheduler::{
    Config, CostModel, Event, FinishReason, Output, Submit, Unfit, Usage, WorkerFault, WorkerReady,
};
use std::collections::VecDeque;
use step::{SlotOp, SlotRef, Upload};

/// What a request is doing; `Absent` is every id that is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Never submitted, or over.
    Absent,
    /// Waits for its first slot.
    Queued,
    /// Waits for a slot again.
    Preempted,
    /// Runs its prompt.
    Prefilling,
    /// Runs a token a step.
    Decoding,
    /// Over, but a step that is under way names its slot.
    Closing,
}

impl Phase {
    /// Every phase.
    pub const ALL: [Self; 6] = [
        Self::Absent,
        Self::Queued,
        Self::Preempted,
        Self::Prefilling,
        Self::Decoding,
        Self::Closing,
    ];
}

#[derive(Debug)]
struct Seat {
    at: SlotRef,
    tables: Vec<Table>,
    computed: u32,
    planned: u32,
    decoding: bool,
    in_set: bool,
    ready: bool,
}

impl Seat {
    fn capacity(&self) -> u32 {
        self.tables.iter().map(Table::end).min().unwrap_or(0) * ids::BLOCK_TOKENS
    }
}

#[derive(Debug)]
enum State {
    Waiting { ran: bool },
    Seated(Seat),
    Closing { slot: SlotId, until: u64 },
}

#[derive(Debug)]
struct Req {
    submit: Submit,
    /// How many were submitted before.
    order: u64,
    output: Vec<TokenId>,
    state: State,
    cached: Option<u32>,
    gave_way: bool,
    /// The output after which its tokens are with the worker.
    uploaded: u64,
    deaths: u32,
    danger: u32,
    /// First prompt position whose log-probability was not told.
    untold: u32,
}

type Rank = (i32, Timestamp, u64);

impl Req {
    fn id(&self) -> RequestId {
        self.submit.request
    }

    fn rank(&self) -> Rank {
        (self.submit.priority, self.submit.arrival, self.order)
    }

    fn known(&self) -> u32 {
        (self.submit.prompt.len() + self.output.len()) as u32
    }

    fn tokens(&self) -> Vec<TokenId> {
        self.submit.prompt.iter().chain(&self.output).copied().collect()
    }

    /// Positions that will ever be written: the last token of the output is not.
    fn limit(&self) -> u32 {
        limit(&self.submit)
    }

    fn tells_prompt(&self) -> bool {
        self.submit.prompt_logprobs.is_some() && self.untold < self.submit.prompt.len() as u32
    }

    fn usage(&self) -> Usage {
        Usage {
            prompt: Tokens(self.submit.prompt.len() as u32),
            cached: Tokens(self.cached.unwrap_or(0)),
            output: Tokens(self.output.len() as u32),
        }
    }

    fn seat(&self) -> Option<&Seat> {
        if let State::Seated(seat) = &self.state { Some(seat) } else { None }
    }

    fn phase(&self) -> Phase {
        match &self.state {
            State::Waiting { ran: false } => Phase::Queued,
            State::Waiting { ran: true } => Phase::Preempted,
            State::Seated(seat) if seat.decoding => Phase::Decoding,
            State::Seated(_) => Phase::Prefilling,
            State::Closing { .. } => Phase::Closing,
        }
    }
}

/// What the other shards are at.
#[derive(Clone, Copy, Debug, Default)]
struct Beside {
    /// Somebody runs there.
    running: bool,
    /// Nobody may be let in here.
    barred: bool,
}

/// What the first in line was short of when it was last looked at.
#[derive(Clone, Copy, Debug)]
struct Blocked {
    request: RequestId,
    group: usize,
    need: u32,
    running: usize,
}

/// The model.
#[derive(Debug)]
pub struct Naive {
    config: Config,
    cost: CostModel,
    /// Everybody who is not over, in order of submission.
    requests: Vec<Req>,
    life: Option<Life>,
    newest: Option<Incarnation>,
    outputs: VecDeque<Output>,
    said: u64,
    blocked: Option<Blocked>,
    /// The first in line, when it was last found to wait for others to be gone.
    lonely: Option<RequestId>,
    replan: bool,
    beside: Beside,
}

type Taken = Result<(), Unfit>;

impl Naive {
    /// A model without a worker.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self {
            config,
            cost: CostModel::default(),
            requests: Vec::new(),
            life: None,
            newest: None,
            outputs: VecDeque::new(),
            said: 0,
            blocked: None,
            lonely: None,
            replan: false,
            beside: Beside::default(),
        }
    }

    /// Takes an event; says why not where it does not fit.
    pub fn handle(&mut self, now: Timestamp, event: &Event) -> Option<Unfit> {
        self.expire(now);
        let taken = match event {
            // Who comes, comes to the group.
            Event::Submit(_) => Err(Unfit::DuplicateRequest),
            Event::Abort(request) => self.end(*request, FinishReason::Aborted),
            Event::Stop { request, keep } => self.stop(*request, keep.as_usize()),
            Event::ForcePreempt(request) => self.force_preempt(*request),
            Event::Outcome(outcome) => self.outcome(now, outcome),
            Event::WorkerReady(ready) => self.ready(now, ready),
            Event::WorkerLost(incarnation) => self.lost(*incarnation),
            Event::Wakeup => {
                self.condemn_overdue(now);
                Ok(())
            }
        };
        taken.err()
    }

    /// The next thing said.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When something happens by itself.
    #[must_use]
    pub fn next_wakeup(&self) -> Option<Timestamp> {
        self.alarm().into_iter().chain(self.overdue_at()).min()
    }

    /// The same, whatever the worker does.
    fn alarm(&self) -> Option<Timestamp> {
        let deadlines = self.requests.iter().filter(|r| r.phase() != Phase::Closing);
        let deadline = deadlines.filter_map(|r| r.submit.deadline).min();
        if self.replan { Some(Timestamp::ZERO) } else { deadline }
    }

    /// What a request is doing.
    #[must_use]
    pub fn phase(&self, request: RequestId) -> Phase {
        self.find(request).map_or(Phase::Absent, |at| self.requests[at].phase())
    }

    /// Everybody who is in a phase, in order of submission.
    #[must_use]
    pub fn in_phase(&self, phase: Phase) -> Vec<RequestId> {
        let there = self.requests.iter().filter(|r| r.phase() == phase);
        there.map(Req::id).collect()
    }

    /// Everybody in the oldest step under way.
    #[must_use]
    pub fn in_oldest_step(&self) -> Vec<RequestId> {
        let oldest = self.life.as_ref().and_then(|life| life.flights.front());
        let Some(oldest) = oldest else { return Vec::new() };
        let chunks = oldest.chunks.iter().map(|(id, ..)| *id);
        let mut all: Vec<_> = chunks.chain(oldest.samplers.iter().map(|(id, _)| *id)).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Who samples in a slot in the oldest step under way.
    #[must_use]
    pub fn sampler(&self, at: SlotRef) -> Option<RequestId> {
        let oldest = self.life.as_ref()?.flights.front()?;
        oldest.samplers.iter().find(|(_, slot)| *slot == at).map(|(id, _)| *id)
    }

    /// Requests whose deadline has come but was not heeded yet.
    #[must_use]
    pub fn late(&self, now: Timestamp) -> Vec<RequestId> {
        let late = self.requests.iter().filter(|r| r.phase() != Phase::Closing);
        late.filter(|r| r.submit.deadline.is_some_and(|at| at <= now)).map(Req::id).collect()
    }

    /// Whether an event now would give the worker up for lost.
    #[must_use]
    pub fn overdue(&self, now: Timestamp) -> bool {
        self.overdue_at().is_some_and(|at| at <= now)
    }

    /// Whether a request that killed two workers in a row has a seat.
    #[must_use]
    pub fn runs_alone(&self) -> bool {
        self.life.as_ref().is_some_and(|life| life.isolated)
    }

    /// Whether such a request is first in line, and was found to wait for others to be gone.
    fn waits_alone(&self) -> bool {
        let first = self.lonely.and_then(|request| self.find(request));
        first.is_some_and(|at| self.requests[at].deaths >= 2)
    }

    /// Whether there is a worker.
    #[must_use]
    pub fn alive(&self) -> bool {
        self.life.is_some()
    }

    fn find(&self, request: RequestId) -> Option<usize> {
        self.requests.iter().position(|r| r.id() == request)
    }

    /// Who is in a phase, first in line first.
    fn in_line(&self, of: impl Fn(Phase) -> bool) -> Vec<RequestId> {
        let mut line: Vec<_> = self.requests.iter().filter(|r| of(r.phase())).collect();
        line.sort_by_key(|r| r.rank());
        line.into_iter().map(Req::id).collect()
    }

    fn waiting(&self) -> Vec<RequestId> {
        self.in_line(|phase| matches!(phase, Phase::Queued | Phase::Preempted))
    }

    fn running(&self) -> Vec<RequestId> {
        self.in_line(|phase| matches!(phase, Phase::Prefilling | Phase::Decoding))
    }

    fn say(&mut self, output: Output) -> u64 {
        self.outputs.push_back(output);
        self.said += 1;
        self.said
    }

    /// Sends everything known of a request to the worker.
    fn upload(&mut self, request: RequestId) {
        let Some(incarnation) = self.life.as_ref().map(|life| life.incarnation) else { return };
        let Some(at) = self.find(request) else { return };
        let prompt = self.requests[at].submit.prompt.clone();
        let output = self.requests[at].output.clone();
        let offset = Tokens(prompt.len() as u32);
        let part = |offset, tokens| Output::Upload(Upload { incarnation, request, offset, tokens });
        let mut uploaded = self.say(part(Tokens::ZERO, prompt));
        if !output.is_empty() {
            uploaded = self.say(part(offset, output.into()));
        }
        self.requests[at].uploaded = uploaded;
    }

    /// Ends a request wherever it is.
    fn end(&mut self, request: RequestId, reason: FinishReason) -> Taken {
        match self.phase(request) {
            Phase::Absent => Err(Unfit::UnknownRequest),
            Phase::Queued | Phase::Preempted => {
                self.end_waiting(request, reason);
                Ok(())
            }
            Phase::Prefilling | Phase::Decoding => {
                self.close(request, reason);
                Ok(())
            }
            Phase::Closing => Err(Unfit::WrongState),
        }
    }

    fn stop(&mut self, request: RequestId, keep: usize) -> Taken {
        let at = self.find(request).ok_or(Unfit::UnknownRequest)?;
        let streamed = self.requests[at].output.len();
        if streamed == 0 || keep > streamed {
            return Err(Unfit::StopBeyondOutput);
        }
        if self.requests[at].phase() != Phase::Closing {
            self.requests[at].output.truncate(keep);
        }
        self.end(request, FinishReason::StopString)
    }

    fn force_preempt(&mut self, request: RequestId) -> Taken {
        match self.phase(request) {
            Phase::Absent => Err(Unfit::UnknownRequest),
            Phase::Prefilling | Phase::Decoding => {
                self.preempt(request);
                Ok(())
            }
            Phase::Queued | Phase::Preempted | Phase::Closing => Err(Unfit::WrongState),
        }
    }

    pub(super) fn expire(&mut self, now: Timestamp) {
        let mut late: Vec<_> = self.requests.iter().collect();
        late.retain(|r| r.phase() != Phase::Closing);
        late.retain(|r| r.submit.deadline.is_some_and(|at| at <= now));
        late.sort_by_key(|r| r.submit.deadline);
        for request in late.into_iter().map(Req::id).collect::<Vec<_>>() {
            let ended = self.end(request, FinishReason::Deadline);
            debug_assert!(ended.is_ok(), "whoever is late can end");
        }
    }

    fn end_waiting(&mut self, request: RequestId, reason: FinishReason) {
        let Some(at) = self.find(request) else { return };
        let gone = self.requests.remove(at);
        if let Some(incarnation) = self.life.as_ref().map(|life| life.incarnation) {
            self.say(Output::Forget(incarnation, request));
        }
        self.say(Output::Finished { request, reason, usage: gone.usage() });
    }

    /// Ends a request that has a seat; its slot stays until no step names it.
    fn close(&mut self, request: RequestId, reason: FinishReason) {
        let (Some(at), Some(life)) = (self.find(request), &mut self.life) else { return };
        let until = life.cache.launched;
        let slot = match &self.requests[at].state {
            State::Seated(seat) => seat.at.slot,
            State::Waiting { .. } | State::Closing { .. } => return,
        };
        self.unseat(at, State::Closing { slot, until });
        let usage = self.requests[at].usage();
        self.say(Output::Finished { request, reason, usage });
        self.life.iter_mut().for_each(|life| life.closing.push(request));
        self.finish_closing();
    }

    /// Puts a request that has a seat back in line.
    fn preempt(&mut self, request: RequestId) {
        let Some(at) = self.find(request) else { return };
        let Some(slot) = self.requests[at].seat().map(|seat| seat.at.slot.0) else { return };
        self.unseat(at, State::Waiting { ran: true });
        if let Some(life) = &mut self.life {
            if life.cache.launched <= life.cache.retired {
                life.free.push(slot);
            } else {
                life.slot_limbo.push((life.cache.launched, slot));
            }
        }
        self.upload(request);
        self.replan = true;
    }

    /// Takes the seat away: the worker is told, the blocks are given back bit by bit.
    fn unseat(&mut self, at: usize, state: State) {
        let before = core::mem::replace(&mut self.requests[at].state, state);
        let last = self.running().is_empty();
        let (State::Seated(seat), Some(life)) = (before, &mut self.life) else { return };
        life.ops.push(SlotOp::Retire { slot: seat.at.slot });
        life.draining.push(seat.tables);
        life.drain();
        if last {
            life.isolated = false;
            life.frugal = false;
        }
    }

    /// Frees the slots of those who are over and whom no step names, oldest first.
    fn finish_closing(&mut self) {
        let Some(life) = &mut self.life else { return };
        while let Some(request) = life.closing.first().copied() {
            let at = self.requests.iter().position(|r| r.id() == request);
            if let Some(at) = at
                && let State::Closing { slot, until } = self.requests[at].state
            {
                if until > life.cache.retired {
                    return;
                }
                life.free.push(slot.0);
                self.requests.remove(at);
            }
            life.closing.remove(0);
        }
    }

    fn ready(&mut self, now: Timestamp, ready: &WorkerReady) -> Taken {
        if self.newest.is_some_and(|newest| ready.incarnation <= newest) {
            return Err(Unfit::StaleIncarnation);
        }
        self.bury();
        self.newest = Some(ready.incarnation);
        self.life = Some(Life::new(ready, self.config.max_running, now));
        let waiting = self.waiting();
        for request in &waiting {
            let submit = self.find(*request).map(|at| self.requests[at].submit.clone());
            if let Some(reason) = submit.and_then(|submit| self.too_large(&submit)) {
                self.end_waiting(*request, FinishReason::Refused(reason));
            }
        }
        waiting.into_iter().for_each(|request| self.upload(request));
        Ok(())
    }

    fn lost(&mut self, incarnation: Incarnation) -> Taken {
        if self.life.as_ref().map(|life| life.incarnation) != Some(incarnation) {
            return Err(Unfit::StaleIncarnation);
        }
        self.bury();
        Ok(())
    }

    /// The worker is gone: whoever ran waits again, whoever was closing is over.
    fn bury(&mut self) {
        let Some(life) = self.life.take() else { return };
        self.blocked = None;
        self.lonely = None;
        self.requests.retain(|r| r.phase() != Phase::Closing);
        let mut ended = Vec::new();
        for r in &mut self.requests {
            let State::Seated(seat) = &r.state else { continue };
            r.danger = seat.planned;
            r.deaths += u32::from(!life.flights.is_empty());
            r.state = State::Waiting { ran: true };
            if r.deaths >= 3 {
                ended.push((r.id(), r.deaths));
            }
        }
        for (request, deaths) in ended {
            self.end_waiting(request, FinishReason::WorkerDied { deaths });
        }
    }

    fn overdue_at(&self) -> Option<Timestamp> {
        let life = self.life.as_ref().filter(|life| !life.condemned)?;
        Some(life.head_since.after(self.allowance()?))
    }

    /// What the oldest step under way may take.
    fn allowance(&self) -> Option<Duration> {
        let oldest = self.life.as_ref()?.flights.front()?;
        let usual = self.cost.predict(oldest.load).unwrap_or_default();
        Some(self.config.step_timeout + 10 * usual)
    }

    fn condemn_overdue(&mut self, now: Timestamp) {
        if !self.overdue(now) {
            return;
        }
        let life = self.life.as_ref();
        if let Some((seq, since)) = life.and_then(|l| Some((l.flights.front()?.seq, l.head_since)))
        {
            let (seq, waited) = (StepSeq(seq), now.since(since));
            self.condemn(WorkerFault::Overdue { seq, waited });
        }
    }

    fn condemn(&mut self, reason: WorkerFault) {
        let Some(life) = self.life.as_mut().filter(|life| !life.condemned) else { return };
        life.condemned = true;
        let incarnation = life.incarnation;
        self.say(Output::RestartWorker { incarnation, reason });
    }
}
