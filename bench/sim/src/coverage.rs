//! Which events met requests in which phase, against the table of what may and what must not.
//!
//! The phases are the naive model's, whose every output equals the scheduler's. The table below is
//! written by hand: a cell says whether the event changes a request in that phase, is refused, or
//! cannot meet one. Invariant: an event in a refused cell changes nothing, which the comparison
//! with the model holds; one in an impossible cell is an error.

use crate::naive::{Group, Naive, Phase};
use ids::{RequestId, Timestamp};
use scheduler::{Event, Joined, Unfit};
use step::Outcome;

/// What meets a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meeting {
    /// A submission under its id.
    Submit,
    /// Its client leaves.
    Abort,
    /// A stop string in its text.
    Stop,
    /// Its deadline.
    Expire,
    /// Preemption by force.
    Preempt,
    /// The outcome of a step that it ran in.
    Outcome,
    /// A token of its own that could not be drawn.
    Fault,
    /// An outcome that contradicts its plan, whoever ran in it.
    Contradiction,
    /// A step that hangs, whoever ran in it.
    Overdue,
    /// The worker's death.
    Lost,
    /// The next worker.
    Ready,
}

/// Whether an event may meet a request in some phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell {
    /// It does something.
    Legal,
    /// It is refused and changes nothing.
    Refused,
    /// It cannot happen.
    Never,
}

use Cell::{Legal as L, Never as N, Refused as R};

/// Rows are meetings; columns phases: absent, queued, preempted, prefilling, decoding, closing.
pub const TABLE: [(Meeting, [Cell; 6]); 11] = [
    (Meeting::Submit, [L, R, R, R, R, R]),
    (Meeting::Abort, [R, L, L, L, L, R]),
    // A request that never ran has no text; one that is prefilling again may have.
    (Meeting::Stop, [R, R, L, L, L, R]),
    (Meeting::Expire, [N, L, L, L, L, N]),
    (Meeting::Preempt, [R, R, R, L, L, R]),
    // Steps outlive seats: a request may wait again, sit elsewhere, or be over.
    (Meeting::Outcome, [L, N, L, L, L, L]),
    // Where nobody sits any more it is one of the samples that are dropped.
    (Meeting::Fault, [N, N, N, N, L, N]),
    (Meeting::Contradiction, [N, L, L, L, L, L]),
    (Meeting::Overdue, [N, L, L, L, L, L]),
    (Meeting::Lost, [N, L, L, L, L, L]),
    // A new worker also tells that the old one is gone.
    (Meeting::Ready, [N, L, L, L, L, L]),
];

/// How often each cell was met.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    met: [[u64; 6]; TABLE.len()],
}

impl Coverage {
    /// Adds another run's.
    pub fn add(&mut self, other: &Self) {
        for (row, more) in self.met.iter_mut().zip(&other.met) {
            row.iter_mut().zip(more).for_each(|(sum, n)| *sum += n);
        }
    }

    /// Cells of one kind, with how often each was met.
    pub fn cells(&self, kind: Cell) -> impl Iterator<Item = (Meeting, Phase, u64)> {
        let row = |(at, (meeting, cells)): (usize, &(Meeting, [Cell; 6]))| {
            let (meeting, cells, met) = (*meeting, *cells, self.met[at]);
            let columns = Phase::ALL.into_iter().zip(cells).zip(met);
            let found = columns.filter(move |((_, cell), _)| *cell == kind);
            found.map(move |((phase, _), n)| (meeting, phase, n)).collect::<Vec<_>>()
        };
        TABLE.iter().enumerate().flat_map(row).collect::<Vec<_>>().into_iter()
    }

    /// Times that the rarest legal cell was met.
    #[must_use]
    pub fn rarest(&self) -> u64 {
        self.cells(Cell::Legal).map(|(.., n)| n).min().unwrap_or(0)
    }

    fn note(&mut self, meeting: Meeting, phase: Phase) -> Result<(), String> {
        let row = TABLE.iter().position(|(m, _)| *m == meeting);
        let column = Phase::ALL.iter().position(|p| *p == phase);
        let (Some(row), Some(column)) = (row, column) else {
            return Err(format!("{meeting:?} or {phase:?} is not in the table"));
        };
        self.met[row][column] += 1;
        match TABLE[row].1[column] {
            Cell::Legal | Cell::Refused => Ok(()),
            Cell::Never => Err(format!("{meeting:?} met a request that is {phase:?}")),
        }
    }

    /// Notes what an event is about to meet.
    ///
    /// # Errors
    /// When it meets what it cannot.
    pub fn event(&mut self, model: &Group, now: Timestamp, event: &Event) -> Result<(), String> {
        self.late(model, now)?;
        let phase = |request: &RequestId| model.phase(*request);
        match event {
            Event::Submit(submit) => self.note(Meeting::Submit, phase(&submit.request)),
            Event::Abort(request) => self.note(Meeting::Abort, phase(request)),
            Event::Stop { request, .. } => self.note(Meeting::Stop, phase(request)),
            Event::ForcePreempt(request) => self.note(Meeting::Preempt, phase(request)),
            Event::WorkerReady(_) => self.all(model, Meeting::Ready, |_| true),
            Event::WorkerLost(_) => self.all(model, Meeting::Lost, Naive::alive),
            Event::Wakeup => self.all(model, Meeting::Overdue, |_| model.overdue(now)),
            Event::Outcome(_) => Err("an outcome that was not joined".into()),
        }
    }

    /// Notes what the result of a step is about to meet.
    ///
    /// # Errors
    /// When it meets what it cannot.
    pub fn joined(&mut self, model: &Group, now: Timestamp, joined: &Joined) -> Result<(), String> {
        self.late(model, now)?;
        match model.parts(joined) {
            Ok(parts) => {
                for (shard, part) in model.shards().iter().zip(&parts) {
                    part.iter().try_for_each(|outcome| self.outcome(shard, outcome))?;
                }
                Ok(())
            }
            Err(Unfit::Contradiction) => self.all(model, Meeting::Contradiction, |_| true),
            Err(_) => Ok(()),
        }
    }

    fn outcome(&mut self, model: &Naive, outcome: &Outcome) -> Result<(), String> {
        for request in model.in_oldest_step() {
            self.note(Meeting::Outcome, model.phase(request))?;
        }
        for sampled in outcome.sampled.iter().filter(|s| s.fault.is_some()) {
            let (slot, generation) = (sampled.slot, sampled.generation);
            let who = model.sampler(step::SlotRef { slot, generation });
            if who.map(|request| model.phase(request)) == Some(Phase::Decoding) {
                self.note(Meeting::Fault, Phase::Decoding)?;
            }
        }
        Ok(())
    }

    /// Notes the deadlines that have come.
    ///
    /// # Errors
    /// When one meets what it cannot.
    pub fn late(&mut self, model: &Group, now: Timestamp) -> Result<(), String> {
        for shard in model.shards() {
            for request in shard.late(now) {
                self.note(Meeting::Expire, shard.phase(request))?;
            }
        }
        Ok(())
    }

    /// What meets the worker meets everybody in the shards that it meets.
    fn all(
        &mut self,
        model: &Group,
        meeting: Meeting,
        meets: impl Fn(&Naive) -> bool,
    ) -> Result<(), String> {
        let mut met = model.shards().iter().filter(|shard| meets(shard));
        met.try_for_each(|shard| self.shard(shard, meeting))
    }

    fn shard(&mut self, model: &Naive, meeting: Meeting) -> Result<(), String> {
        for phase in Phase::ALL {
            for _ in model.in_phase(phase) {
                self.note(meeting, phase)?;
            }
        }
        Ok(())
    }
}
