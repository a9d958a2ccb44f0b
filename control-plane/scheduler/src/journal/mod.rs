//! The step journal: what every recent step did to whom, and when; from it any recent request's
//! latency is explained step by step.
//!
//! A witness beside the scheduler: whoever drives the scheduler tells it what went in and what came
//! out, with the time. It decides nothing, and nothing depends on it. Cost O(changes): a steady step is
//! two lines of fixed size, since who decodes is known from who joined and left. Invariant: no more
//! memory than it was given, and none of it asked for after [`Journal::new`] (readers aside).

mod entry;
mod history;
mod replay;
mod ring;
mod spans;

pub use entry::Ending;
pub use history::{History, NotKept, Role, StepShare};
pub use spans::{Part, Span, Wait};

use crate::event::Submit;
use crate::output::Output;
use crate::report::{Planned, Waits};
use core::time::Duration;
use entry::{End, Entry, Plan, Row};
use ids::{Incarnation, RequestId, ShardId, StepSeq, Timestamp, Tokens};
use ring::{Ring, Segment};
use std::collections::VecDeque;
use std::sync::Arc;
use step::{Section, SlotOp, StepTiming, Upload};

/// Steps that can be under way or ended in one turn, with room to spare.
const UNDER_WAY: usize = 16;

/// The journal of one scheduler.
#[derive(Debug)]
pub struct Journal {
    ring: Ring,
    life: Incarnation,
    /// Sent and not answered, oldest first, and when they were sent.
    flying: VecDeque<(StepSeq, Timestamp)>,
    /// Answered, and their results not yet handed on.
    landed: Vec<End>,
    /// The first in each shard's line, as last noted.
    heads: Vec<Option<(RequestId, Waits)>>,
    newest: Option<RequestId>,
}

impl Journal {
    /// A journal of about so many bytes, all taken now, for so many slots in each of so many shards. It
    /// keeps a few thousand lines however few bytes it is given.
    #[must_use]
    pub fn new(bytes: usize, slots: u32, shards: u16) -> Self {
        let shards = usize::from(shards.max(1));
        Self {
            ring: Ring::new(bytes, slots as usize, shards),
            life: Incarnation(0),
            flying: VecDeque::with_capacity(UNDER_WAY),
            landed: Vec::with_capacity(UNDER_WAY),
            heads: vec![None; shards],
            newest: None,
        }
    }

    /// Bytes that it takes at most.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.ring.bytes()
    }

    /// A request is handed to the scheduler.
    pub fn submitted(&mut self, submit: &Submit) {
        let prompt = Tokens(u32::try_from(submit.prompt.len()).unwrap_or(u32::MAX));
        let (request, arrival) = (submit.request, submit.arrival);
        self.ring.push(Entry::Submitted { request, arrival, prompt });
        self.newest = self.newest.max(Some(request));
    }

    /// A request stays in this shard; needs to be said where there are several.
    pub fn placed(&mut self, request: RequestId, shard: ShardId) {
        self.ring.push(Entry::Placed(request, shard));
    }

    /// The scheduler said something.
    pub fn said(&mut self, now: Timestamp, output: &Output) {
        let (request, by, output) = match output {
            Output::Finished { request, reason, usage } => {
                (*request, Ending::of(*reason), usage.output)
            }
            Output::Refused { request, .. } => (*request, Ending::Refused, Tokens::ZERO),
            // The tokens of one that sits are sent again when it loses its seat.
            Output::Upload(Upload { request, offset: Tokens::ZERO, .. })
                if self.ring.seats().row_of(*request).is_some() =>
            {
                return self.ring.push(Entry::Unseated(*request, now));
            }
            Output::Upload(_)
            | Output::Forget(..)
            | Output::Started { .. }
            | Output::Token { .. }
            | Output::PromptLogprobs(_)
            | Output::RestartWorker { .. } => return,
        };
        self.ring.push(Entry::Finished { request, at: now, by, output });
    }

    /// A plan was made, and is about to be sent. `stalled` are those with a seat that it leaves out; who
    /// is first in line was told before.
    pub fn planned<'a>(
        &mut self,
        now: Timestamp,
        planned: &Planned,
        stalled: impl IntoIterator<Item = &'a (RequestId, Waits)>,
    ) {
        let Planned { plan, report } = planned;
        for (request, waits) in stalled {
            self.ring.push(Entry::Stalled(*request, *waits));
        }
        for (shard, section) in (0_u16..).zip(&plan.sections) {
            self.section(ShardId(shard), section);
        }
        let micros = |time: Duration| u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
        self.ring.push(Entry::Planned(Plan {
            at: now,
            seq: plan.seq,
            decode: report.decode,
            chunks: report.chunks,
            prefill: report.prefill_tokens,
            running: report.running,
            waiting: report.waiting,
            ahead: u8::try_from(report.ahead).unwrap_or(u8::MAX),
            cache_percent: (report.cache_usage.clamp(0.0, 1.0) * 100.0) as u8,
            predicted_us: report.predicted.map_or(0, micros),
        }));
    }

    fn section(&mut self, shard: ShardId, section: &Section) {
        let row = |slot: ids::SlotId| Row { shard, slot: slot.0 };
        for op in &section.ops {
            self.ring.push(match op {
                SlotOp::Admit(admit) => Entry::Admitted {
                    request: admit.request,
                    row: row(admit.slot.slot),
                    known: admit.known,
                    cached: admit.cached,
                },
                SlotOp::Retire { slot } => Entry::Vacated(row(*slot)),
                SlotOp::Extend { .. }
                | SlotOp::Trim { .. }
                | SlotOp::Store { .. }
                | SlotOp::Load { .. } => continue,
            });
        }
        for slot in &section.decode.leave {
            self.ring.push(Entry::Left(row(*slot)));
        }
        for slot in &section.decode.join {
            self.ring.push(Entry::Joined(row(*slot)));
        }
        for run in &section.prefill {
            let (tokens, sample) = (run.tokens, run.sample);
            self.ring.push(Entry::Chunk { row: row(run.slot), tokens, sample });
        }
    }

    /// Who is first in a shard's line after an attempt to plan: before [`Self::planned`], and where it
    /// came to nothing.
    pub fn looked(&mut self, shard: ShardId, head: Option<(RequestId, Waits)>) {
        let Some(noted) = self.heads.get_mut(shard.index()).filter(|noted| **noted != head) else {
            return;
        };
        *noted = head;
        self.ring.push(match head {
            Some((request, waits)) => Entry::Head(shard, request, waits),
            None => Entry::NoHead(shard),
        });
    }

    /// The plan left for the worker.
    pub fn sent(&mut self, now: Timestamp, seq: StepSeq) {
        self.flying.push_back((seq, now));
    }

    /// A step's outcome came in, of every shard. One that answers nothing is not noted.
    pub fn answered(
        &mut self,
        now: Timestamp,
        life: Incarnation,
        seq: StepSeq,
        timing: &StepTiming,
    ) {
        let due = self.flying.front().copied();
        let Some((seq, sent)) = due.filter(|(due, _)| *due == seq && life == self.life) else {
            return;
        };
        self.flying.pop_front();
        let micros = |ns: u64| u32::try_from(ns / 1000).unwrap_or(u32::MAX);
        self.landed.push(End {
            seq,
            sent,
            answered: now,
            delivered: now,
            total_us: micros(timing.total_ns),
            model_us: micros(timing.model_ns),
        });
    }

    /// Everything said so far was handed to its requests.
    pub fn delivered(&mut self, now: Timestamp) {
        for end in self.landed.drain(..) {
            self.ring.push(Entry::Ended(End { delivered: now, ..end }));
        }
    }

    /// A worker begins to serve.
    pub fn ready(&mut self, now: Timestamp, life: Incarnation) {
        if !self.flying.is_empty() || self.ring.seats().seated().next().is_some() {
            // Only the next life tells that the last is over.
            self.lost(now);
        }
        self.life = life;
        self.ring.push(Entry::Ready(now));
    }

    /// The worker is gone.
    pub fn lost(&mut self, now: Timestamp) {
        self.delivered(now);
        self.flying.clear();
        self.ring.push(Entry::Lost(now));
    }

    /// All that is kept, to be read elsewhere: the scheduler's thread has better things to do.
    #[must_use]
    pub fn read(&self, now: Timestamp) -> Pages {
        Pages {
            segments: self.ring.read(),
            flying: self.flying.iter().copied().collect(),
            newest: self.newest,
            now,
        }
    }
}

/// A journal as it was at one moment.
#[derive(Clone, Debug)]
pub struct Pages {
    segments: Vec<Arc<Segment>>,
    flying: Vec<(StepSeq, Timestamp)>,
    /// The newest request that was ever submitted.
    newest: Option<RequestId>,
    now: Timestamp,
}
