//! The life of a request as types. A transition takes `self`, so a request is in one state, and a
//! state owns what it holds: what does not fit does not compile.
//!
//! ```text
//!  Queued ──admit──> Prefilling ──decode──> Decoding
//!    │                │  │    ^                │  │
//!  finish       close │  └─┐  └─admit──┐ ┌─────┘  │ close
//!    v                v  preempt/lose  │ v        v
//!  Finished <──finish── Closing      Preempted  Closing ──finish──> Finished
//! ```
//! It decides nothing: the scheduler chooses the moment. Invariant: blocks and slot leave a
//! request only through the transition's result, so none can be forgotten.

use crate::job::Job;
use crate::output::FinishReason;
use crate::slots::SlotLease;
use crate::tables::Tables;
use ids::{StepSeq, Tokens};
use kv_cache::{Buried, Retired};

/// A request in state `S`.
#[derive(Debug)]
pub struct Request<S> {
    pub(crate) job: Box<Job>,
    pub(crate) state: S,
}

/// Never ran. Holds nothing.
#[derive(Debug)]
pub struct Queued(());

/// Ran and lost its seat; its tokens are kept and will be run again. Holds nothing.
#[derive(Debug)]
pub struct Preempted(());

/// Known tokens are being run in chunks.
#[derive(Debug)]
pub struct Prefilling {
    pub(crate) seat: Seat,
}

/// The last chunk is launched; one token per step from here.
#[derive(Debug)]
pub struct Decoding {
    pub(crate) seat: Seat,
    /// Whether the worker has the slot in its decode set.
    pub(crate) in_set: bool,
    /// Whether the step being planned can run it.
    pub(crate) ready: bool,
    /// Position in the scheduler's list of decoding requests.
    pub(crate) lane: usize,
}

/// Ended, but launched steps still refer to the slot.
#[derive(Debug)]
pub struct Closing {
    slot: SlotLease,
    reason: FinishReason,
    in_flight: StepSeq,
}

/// Over. Holds nothing.
#[derive(Debug)]
pub struct Finished {
    reason: FinishReason,
}

/// What a running request holds.
#[derive(Debug)]
pub struct Seat {
    pub(crate) slot: SlotLease,
    pub(crate) tables: Tables,
    /// Tokens whose KV a retired step has written.
    pub(crate) computed: Tokens,
    /// Tokens whose KV is written when every launched step has run.
    pub(crate) planned: Tokens,
    /// Tokens that have a block in every group, as the tables say.
    pub(crate) capacity: Tokens,
}

impl Seat {
    /// A seat whose tables start with `cached` tokens of shared prefix.
    pub(crate) fn new(slot: SlotLease, tables: Tables, cached: Tokens) -> Self {
        let capacity = tables.capacity();
        Self { slot, tables, computed: cached, planned: cached, capacity }
    }

    fn void(self, buried: &Buried) {
        self.tables.void(buried);
        self.slot.void(buried);
    }
}

impl Request<Queued> {
    pub(crate) fn new(job: Job) -> Self {
        Self { job: Box::new(job), state: Queued(()) }
    }

    /// Takes a seat for the first time.
    #[must_use]
    pub fn admit(self, seat: Seat) -> Request<Prefilling> {
        Request { job: self.job, state: Prefilling { seat } }
    }

    /// Ends without having run.
    #[must_use]
    pub fn finish(self, reason: FinishReason) -> Request<Finished> {
        Request { job: self.job, state: Finished { reason } }
    }
}

impl Request<Preempted> {
    /// Takes a seat again, to run everything known.
    #[must_use]
    pub fn admit(self, seat: Seat) -> Request<Prefilling> {
        Request { job: self.job, state: Prefilling { seat } }
    }

    /// Ends without running again.
    #[must_use]
    pub fn finish(self, reason: FinishReason) -> Request<Finished> {
        Request { job: self.job, state: Finished { reason } }
    }
}

impl Request<Prefilling> {
    /// The last chunk is launched; `lane` is its place among the decoding.
    #[must_use]
    pub fn decode(self, lane: usize) -> Request<Decoding> {
        let seat = self.state.seat;
        Request { job: self.job, state: Decoding { seat, in_set: false, ready: false, lane } }
    }

    /// Gives up its seat.
    #[must_use]
    pub fn preempt(self) -> (Request<Preempted>, Seat) {
        (Request { job: self.job, state: Preempted(()) }, self.state.seat)
    }

    /// Ends; steps up to `in_flight` still refer to the slot, the blocks go their own way.
    #[must_use]
    pub fn close(self, reason: FinishReason, in_flight: StepSeq) -> (Request<Closing>, Tables) {
        close(self.job, self.state.seat, reason, in_flight)
    }

    /// The worker is gone, and the seat with it.
    #[must_use]
    pub fn lose(self, buried: &Buried) -> Request<Preempted> {
        self.state.seat.void(buried);
        Request { job: self.job, state: Preempted(()) }
    }
}

impl Request<Decoding> {
    /// Gives up its seat.
    #[must_use]
    pub fn preempt(self) -> (Request<Preempted>, Seat) {
        (Request { job: self.job, state: Preempted(()) }, self.state.seat)
    }

    /// Ends; steps up to `in_flight` still refer to the slot, the blocks go their own way.
    #[must_use]
    pub fn close(self, reason: FinishReason, in_flight: StepSeq) -> (Request<Closing>, Tables) {
        close(self.job, self.state.seat, reason, in_flight)
    }

    /// The worker is gone, and the seat with it.
    #[must_use]
    pub fn lose(self, buried: &Buried) -> Request<Preempted> {
        self.state.seat.void(buried);
        Request { job: self.job, state: Preempted(()) }
    }
}

impl Request<Closing> {
    /// The newest step that refers to the slot.
    #[must_use]
    pub fn in_flight(&self) -> StepSeq {
        self.state.in_flight
    }

    pub(crate) fn slot(&self) -> ids::SlotId {
        self.state.slot.at().slot
    }

    /// Gives up the slot once no launched step refers to it.
    ///
    /// # Errors
    /// Itself, unchanged, while one does.
    pub fn finish(self, retired: &Retired) -> Result<(Request<Finished>, SlotLease), Box<Self>> {
        if !retired.covers(self.state.in_flight) {
            return Err(Box::new(self));
        }
        let Closing { slot, reason, .. } = self.state;
        Ok((Request { job: self.job, state: Finished { reason } }, slot))
    }

    /// The worker is gone, and the slot with it.
    #[must_use]
    pub fn lose(self, buried: &Buried) -> Request<Finished> {
        let Closing { slot, reason, .. } = self.state;
        slot.void(buried);
        Request { job: self.job, state: Finished { reason } }
    }
}

impl Request<Finished> {
    /// Why it ended.
    #[must_use]
    pub fn reason(&self) -> FinishReason {
        self.state.reason
    }
}

fn close(
    job: Box<Job>,
    seat: Seat,
    reason: FinishReason,
    in_flight: StepSeq,
) -> (Request<Closing>, Tables) {
    let state = Closing { slot: seat.slot, reason, in_flight };
    (Request { job, state }, seat.tables)
}

/// A request in whatever state it is. `Finished` is not stored: its last output is all that is
/// left of it.
#[derive(Debug)]
pub(crate) enum Live {
    Queued(Request<Queued>),
    Preempted(Request<Preempted>),
    Prefilling(Request<Prefilling>),
    Decoding(Request<Decoding>),
    Closing(Request<Closing>),
}

impl Live {
    pub(crate) fn job(&self) -> &Job {
        match self {
            Self::Queued(r) => &r.job,
            Self::Preempted(r) => &r.job,
            Self::Prefilling(r) => &r.job,
            Self::Decoding(r) => &r.job,
            Self::Closing(r) => &r.job,
        }
    }

    pub(crate) fn job_mut(&mut self) -> &mut Job {
        match self {
            Self::Queued(r) => &mut r.job,
            Self::Preempted(r) => &mut r.job,
            Self::Prefilling(r) => &mut r.job,
            Self::Decoding(r) => &mut r.job,
            Self::Closing(r) => &mut r.job,
        }
    }

    /// Job and seat of a request that has one.
    pub(crate) fn seated(&mut self) -> Option<(&mut Job, &mut Seat)> {
        match self {
            Self::Prefilling(r) => Some((&mut r.job, &mut r.state.seat)),
            Self::Decoding(r) => Some((&mut r.job, &mut r.state.seat)),
            Self::Queued(_) | Self::Preempted(_) | Self::Closing(_) => None,
        }
    }

    pub(crate) fn seat(&self) -> Option<&Seat> {
        match self {
            Self::Prefilling(r) => Some(&r.state.seat),
            Self::Decoding(r) => Some(&r.state.seat),
            Self::Queued(_) | Self::Preempted(_) | Self::Closing(_) => None,
        }
    }
}
