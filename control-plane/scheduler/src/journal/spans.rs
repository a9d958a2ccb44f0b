//! A request's life cut into spans, each with what the time went into.
//!
//! The worker runs one step after another, so every moment belongs to one step or lies between two; a
//! step that the request was left out of is time that it waited, for what its plan said. It knows no
//! slots. Invariant: spans touch, begin at the arrival and end with the request, so that their lengths
//! add up to its latency.

use super::replay::{Found, Share, Slice};
use crate::report::Waits;
use ids::{RequestId, StepSeq, Timestamp, Tokens};

/// What a request in line waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// It is the first in line.
    For(Waits),
    /// Another is, and waits itself.
    Behind {
        /// The first in line.
        head: RequestId,
        /// What that waits for.
        waits: Waits,
    },
    /// Nothing in particular: the next plan.
    NextPlan,
    /// The last token it may run is launched; its result is under way.
    Outcome,
}

/// What time goes into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// In line; `again` after it had a seat.
    Queued {
        /// For what.
        wait: Wait,
        /// Whether it had run before.
        again: bool,
    },
    /// Steps that were planned before it came.
    Ahead,
    /// No step ran: planning, sending, waiting for messages.
    Host,
    /// A step with known tokens of it: its prompt, or all of it again.
    Prefill(Tokens),
    /// A step with one token of it.
    Decode,
    /// It had a seat, and the step went without it.
    Stalled(Waits),
    /// A step that ended after the seat was taken away: it is done again.
    Dropped,
    /// A step that a dying worker took with it.
    Lost,
    /// Results on their way to those who wait for them.
    Deliver,
}

impl Part {
    /// The kind as a word.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Queued { again: false, .. } => "queued",
            Self::Queued { again: true, .. } => "queued_again",
            Self::Ahead => "ahead",
            Self::Host => "host",
            Self::Prefill(_) => "prefill",
            Self::Decode => "decode",
            Self::Stalled(_) => "stalled",
            Self::Dropped => "dropped",
            Self::Lost => "lost",
            Self::Deliver => "deliver",
        }
    }

    /// What is waited for, and as a word.
    #[must_use]
    pub fn waits(self) -> Option<(Wait, &'static str)> {
        let wait = match self {
            Self::Queued { wait, .. } => wait,
            Self::Stalled(waits) => Wait::For(waits),
            Self::Ahead
            | Self::Host
            | Self::Prefill(_)
            | Self::Decode
            | Self::Dropped
            | Self::Lost
            | Self::Deliver => return None,
        };
        let word = match wait {
            Wait::For(waits) | Wait::Behind { waits, .. } => waits.label(),
            Wait::NextPlan => "next_plan",
            Wait::Outcome => "outcome",
        };
        Some((wait, word))
    }

    /// Whether both are one thing to a reader, numbers aside.
    fn continues(self, before: Self) -> bool {
        let behind = |part: Self| match part.waits() {
            Some((Wait::Behind { head, .. }, _)) => Some(head),
            Some(_) | None => None,
        };
        let word = |part: Self| part.waits().map(|(_, word)| word);
        self.label() == before.label()
            && word(self) == word(before)
            && behind(self) == behind(before)
    }
}

/// A stretch of time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Span {
    /// Its begin.
    pub from: Timestamp,
    /// Its end, where the next begins.
    pub to: Timestamp,
    /// What it went into; numbers are those of its begin, prompt tokens a sum.
    pub part: Part,
    /// Steps in it.
    pub steps: u32,
    /// The first and last of them.
    pub seqs: Option<(StepSeq, StepSeq)>,
}

/// Cuts `[from, to]`. What lies behind the last answered step is delivery where that step ended the
/// request, else what the request did since.
pub(crate) fn cut(found: &Found, from: Timestamp, to: Timestamp) -> Vec<Span> {
    let mut cut = Cut { found, cursor: from, to, spans: Vec::new() };
    for slice in &found.slices {
        cut.slice(slice);
    }
    let by_outcome = found.finished.is_some_and(|(_, by, _)| by.by_outcome());
    let rest = match &found.waits {
        _ if by_outcome => Part::Deliver,
        Some(share) => cut.part(share),
        None => Part::Host,
    };
    cut.idle(to, rest);
    cut.spans
}

struct Cut<'a> {
    found: &'a Found,
    cursor: Timestamp,
    to: Timestamp,
    spans: Vec<Span>,
}

impl Cut<'_> {
    fn slice(&mut self, slice: &Slice) {
        // A step behind an unfinished one has not begun.
        let Some(start) = slice.start else { return };
        let stop = slice.lost.or(slice.end.map(|end| end.answered)).unwrap_or(self.to);
        let part = match (slice.lost, &slice.share) {
            (Some(_), _) => Part::Lost,
            (None, _) if slice.dropped() => Part::Dropped,
            (None, share) => self.part(share),
        };
        self.idle(start, Part::Host);
        let own =
            matches!(part, Part::Prefill(_) | Part::Decode | Part::Dropped) && slice.end.is_some();
        let steps = u32::from(own || stop.min(self.to) > self.cursor);
        self.put(stop, part, steps, Some(slice.plan.seq));
    }

    fn part(&self, share: &Share) -> Part {
        let ran = |part: &Span| matches!(part.part, Part::Prefill(_) | Part::Decode | Part::Lost);
        match share {
            Share::Chunk { tokens, .. } => Part::Prefill(*tokens),
            Share::Decode => Part::Decode,
            Share::Stalled(waits) => Part::Stalled(*waits),
            Share::InLine(wait) => Part::Queued { wait: *wait, again: self.spans.iter().any(ran) },
            Share::Before => Part::Ahead,
        }
    }

    /// Time up to `stop` in which no step ran: without a worker that is what was waited for.
    fn idle(&mut self, stop: Timestamp, part: Part) {
        for (from, to) in &self.found.down {
            if *to > self.cursor && *from < stop {
                self.put(*from, part, 0, None);
                let worker = Share::InLine(Wait::For(Waits::Worker));
                self.put((*to).min(stop), self.part(&worker), 0, None);
            }
        }
        self.put(stop, part, 0, None);
    }

    fn put(&mut self, stop: Timestamp, part: Part, steps: u32, seq: Option<StepSeq>) {
        let stop = stop.min(self.to);
        let ran = steps > 0 && stop >= self.cursor;
        if stop <= self.cursor && !ran {
            return;
        }
        let from = self.cursor;
        self.cursor = stop;
        let seqs = seq.map(|seq| (seq, seq));
        if let Some(last) = self.spans.last_mut()
            && part.continues(last.part)
        {
            last.to = stop;
            last.steps += steps;
            last.seqs = last.seqs.zip(seqs).map(|(a, b)| (a.0, b.1)).or(last.seqs).or(seqs);
            if let (Part::Prefill(sum), Part::Prefill(tokens)) = (&mut last.part, part) {
                *sum += tokens;
            }
            return;
        }
        self.spans.push(Span { from, to: stop, part, steps, seqs });
    }
}
