//! One request's story, as whoever asks gets it.
//!
//! Made from pages off the scheduler's thread. Invariant: [`History::spans`] cover the request's time
//! from arrival to end, or to the moment of the pages while it lives.

use super::Pages;
use super::entry::{Ending, Entry};
use super::replay::{Share, Slice, first_seen, replay};
use super::spans::{Span, cut};
use core::time::Duration;
use ids::{RequestId, StepSeq, Timestamp, Tokens};

/// Why a request's story cannot be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotKept {
    /// It never came in.
    #[error("no request of this number was submitted")]
    Unknown,
    /// Its lines were written over.
    #[error("its lines were written over; the journal reaches {} ms back", reach.as_millis())]
    WrittenOver {
        /// How far back the journal reaches.
        reach: Duration,
    },
}

/// What a step did for the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Ran this many known tokens; the last chunk samples.
    Prefill {
        /// Tokens.
        tokens: Tokens,
        /// Whether the next token was drawn.
        sample: bool,
    },
    /// Ran and drew one token.
    Decode,
}

/// A step that the request took part in.
#[derive(Clone, Debug, PartialEq)]
pub struct StepShare {
    /// The step, within its life of the worker.
    pub seq: StepSeq,
    /// Its part.
    pub role: Role,
    /// When the plan was made.
    pub planned: Timestamp,
    /// When the worker could begin: the plan was there and the step before had ended.
    pub start: Option<Timestamp>,
    /// When its outcome came.
    pub answered: Option<Timestamp>,
    /// When results were handed on.
    pub delivered: Option<Timestamp>,
    /// The worker's own time for it.
    pub took: Option<Duration>,
    /// Of that, in the model.
    pub model: Option<Duration>,
    /// What the cost model had foretold.
    pub predicted: Option<Duration>,
    /// Slots that decoded in it.
    pub decode: u32,
    /// Requests with a chunk.
    pub chunks: u32,
    /// Prompt tokens.
    pub prefill: Tokens,
    /// Steps under way when it was planned.
    pub ahead: u32,
    /// Requests with a slot, and without.
    pub running: u32,
    /// Requests without a slot.
    pub waiting: u32,
    /// Of the cache, in use.
    pub cache_percent: u8,
    /// Chunks of others in it.
    pub beside: Vec<(RequestId, Tokens)>,
    /// The worker died before it answered.
    pub lost: bool,
    /// It ended after the seat was taken away, and is done again.
    pub dropped: bool,
}

/// The story.
#[derive(Clone, Debug, PartialEq)]
pub struct History {
    /// Whose.
    pub request: RequestId,
    /// When it came in; where `cut`, the oldest that is known.
    pub arrival: Timestamp,
    /// Its end: results handed on. None while it lives.
    pub end: Option<Timestamp>,
    /// How it ended, and with how many tokens.
    pub ending: Option<(Ending, Tokens)>,
    /// When the first token was handed on.
    pub first_token: Option<Timestamp>,
    /// Its begin was written over.
    pub cut: bool,
    /// Of its prompt.
    pub prompt: Tokens,
    /// Of its prompt, found in the cache at first admission.
    pub cached: Tokens,
    /// Times it lost its seat to others.
    pub preemptions: u32,
    /// Where the time went.
    pub spans: Vec<Span>,
    /// The steps it took part in.
    pub steps: Vec<StepShare>,
    /// Who else ran in them, and in how many; most first.
    pub mates: Vec<(RequestId, u32)>,
}

impl Pages {
    /// How far back they reach.
    #[must_use]
    pub fn reach(&self) -> Duration {
        self.now.since(self.oldest(0).unwrap_or(self.now))
    }

    /// The story of a request.
    ///
    /// # Errors
    /// When nothing is kept of it.
    pub fn history(&self, request: RequestId) -> Result<History, NotKept> {
        let Some(first) = first_seen(&self.segments, request) else {
            let known = self.newest.is_some_and(|newest| request <= newest);
            let reach = self.reach();
            return Err(if known { NotKept::WrittenOver { reach } } else { NotKept::Unknown });
        };
        let mut found = replay(self, first, request);
        let own = |slice: &&Slice| matches!(slice.share, Share::Chunk { .. } | Share::Decode);
        let (finished, by_outcome) = match found.finished {
            Some((at, by, _)) => (Some(at), by.by_outcome()),
            None => (None, false),
        };
        if let Some(at) = finished.filter(|_| by_outcome) {
            // What was launched for it before its end was known is dropped.
            found.slices.retain(|slice| {
                slice.lost.is_some() || slice.end.is_some_and(|end| end.answered <= at)
            });
        }
        let arrival = found.arrival.or_else(|| self.oldest(first)).unwrap_or(self.now);
        let delivered = |slice: &Slice| slice.end.map(|end| end.delivered);
        let last = found.slices.iter().rev().find(own).and_then(delivered);
        let last = last.filter(|_| by_outcome);
        let end = finished.map(|at| last.map_or(at, |delivered| delivered.max(at)));
        let draws = |slice: &&Slice| {
            matches!(slice.share, Share::Decode | Share::Chunk { sample: true, .. })
        };
        // A request that draws nothing still ends with a step.
        let generated = found.finished.is_none_or(|(_, _, output)| !output.is_zero());
        let first_token = found
            .slices
            .iter()
            .filter(|_| generated)
            .find(|slice| draws(slice) && !slice.dropped())
            .and_then(delivered);
        let spans = cut(&found, arrival, end.unwrap_or(self.now));
        let mut mates: Vec<_> = found.mates.into_iter().collect();
        mates.sort_by_key(|(request, steps)| (u32::MAX - steps, *request));
        Ok(History {
            request,
            arrival,
            end,
            ending: found.finished.map(|(_, by, output)| (by, output)),
            first_token: if found.arrival.is_some() { first_token } else { None },
            cut: found.arrival.is_none(),
            prompt: found.prompt,
            cached: found.cached.unwrap_or_default(),
            preemptions: found.preemptions,
            spans,
            steps: found.slices.iter().filter_map(share).collect(),
            mates,
        })
    }

    /// The first time in a segment, or behind it.
    fn oldest(&self, from: usize) -> Option<Timestamp> {
        let entries = self.segments[from..].iter().flat_map(|segment| &segment.entries);
        entries
            .filter_map(|entry| match entry {
                Entry::Submitted { arrival: at, .. }
                | Entry::Finished { at, .. }
                | Entry::Unseated(_, at)
                | Entry::Ready(at)
                | Entry::Lost(at) => Some(*at),
                Entry::Planned(plan) => Some(plan.at),
                Entry::Ended(end) => Some(end.answered),
                Entry::Placed(..)
                | Entry::Head(..)
                | Entry::NoHead(_)
                | Entry::Stalled(..)
                | Entry::Admitted { .. }
                | Entry::Vacated(_)
                | Entry::Chunk { .. }
                | Entry::Joined(_)
                | Entry::Left(_) => None,
            })
            .next()
    }
}

fn share(slice: &Slice) -> Option<StepShare> {
    let role = match slice.share {
        Share::Chunk { tokens, sample } => Role::Prefill { tokens, sample },
        Share::Decode => Role::Decode,
        Share::Stalled(_) | Share::InLine(_) | Share::Before => return None,
    };
    let micros = |us: u32| Duration::from_micros(us.into());
    let (plan, end) = (&slice.plan, &slice.end);
    Some(StepShare {
        seq: plan.seq,
        role,
        planned: plan.at,
        start: slice.start,
        answered: end.map(|end| end.answered),
        delivered: end.map(|end| end.delivered),
        took: end.map(|end| micros(end.total_us)),
        model: end.map(|end| micros(end.model_us)),
        predicted: (plan.predicted_us > 0).then(|| micros(plan.predicted_us)),
        decode: plan.decode,
        chunks: plan.chunks,
        prefill: plan.prefill,
        ahead: plan.ahead.into(),
        running: plan.running,
        waiting: plan.waiting,
        cache_percent: plan.cache_percent,
        beside: slice.beside.clone(),
        lost: slice.lost.is_some(),
        dropped: slice.lost.is_none() && slice.dropped(),
    })
}
