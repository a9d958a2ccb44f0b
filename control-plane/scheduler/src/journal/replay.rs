//! Reads the journal for one request: every step of its life, its own and those that went without it.
//!
//! It follows seats from where the request came in; it measures nothing. Invariant: slices are in the
//! order in which the worker runs their steps.

use super::Pages;
use super::entry::{End, Ending, Entry, Plan, Row};
use super::ring::{Seats, Segment};
use super::spans::Wait;
use crate::report::Waits;
use ids::{RequestId, ShardId, StepSeq, Timestamp, Tokens};
use std::collections::BTreeMap;

/// What a step is to the request.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Share {
    /// It runs a part of the known tokens, and samples after the last of them.
    Chunk { tokens: Tokens, sample: bool },
    /// It runs one token.
    Decode,
    /// It had a seat and was left out.
    Stalled(Waits),
    /// It stood in line.
    InLine(Wait),
    /// The plan was made before the request came.
    Before,
}

/// A step that was planned or under way while the request lived.
#[derive(Clone, Debug)]
pub(crate) struct Slice {
    pub(crate) plan: Plan,
    pub(crate) share: Share,
    /// Prompt chunks of others: whose, how long.
    pub(crate) beside: Vec<(RequestId, Tokens)>,
    pub(crate) end: Option<End>,
    /// When the worker could begin with it.
    pub(crate) start: Option<Timestamp>,
    /// The worker died before it answered.
    pub(crate) lost: Option<Timestamp>,
    /// When the seat was taken away; what is answered later is not used.
    pub(crate) unseated: Option<Timestamp>,
}

impl Slice {
    /// Whether what the step did for the request was thrown away, as it had no seat any more.
    pub(crate) fn dropped(&self) -> bool {
        let late = |at| self.end.is_none_or(|end| end.answered > at);
        matches!(self.share, Share::Chunk { .. } | Share::Decode) && self.unseated.is_some_and(late)
    }
}

/// What was found about the request.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) slices: Vec<Slice>,
    pub(crate) arrival: Option<Timestamp>,
    pub(crate) prompt: Tokens,
    pub(crate) cached: Option<Tokens>,
    pub(crate) finished: Option<(Timestamp, Ending, Tokens)>,
    pub(crate) preemptions: u32,
    /// When there was no worker.
    pub(crate) down: Vec<(Timestamp, Timestamp)>,
    /// Steps shared with others.
    pub(crate) mates: BTreeMap<RequestId, u32>,
    /// What it waits for since the newest plan.
    pub(crate) waits: Option<Share>,
}

/// The segment in which a request first appears.
pub(crate) fn first_seen(segments: &[std::sync::Arc<Segment>], of: RequestId) -> Option<usize> {
    segments.iter().position(|segment| {
        segment.opening.row_of(of).is_some() || segment.entries.iter().any(|entry| names(entry, of))
    })
}

fn names(entry: &Entry, of: RequestId) -> bool {
    match entry {
        Entry::Submitted { request, .. }
        | Entry::Placed(request, _)
        | Entry::Unseated(request, _)
        | Entry::Head(_, request, _)
        | Entry::Stalled(request, _)
        | Entry::Admitted { request, .. }
        | Entry::Finished { request, .. } => *request == of,
        Entry::NoHead(_)
        | Entry::Vacated(_)
        | Entry::Chunk { .. }
        | Entry::Joined(_)
        | Entry::Left(_)
        | Entry::Planned(_)
        | Entry::Ended(_)
        | Entry::Ready(_)
        | Entry::Lost(_) => false,
    }
}

/// Reads on from the segment in which `of` first appears.
pub(crate) fn replay(pages: &Pages, first: usize, of: RequestId) -> Found {
    // Steps under way when it came may have been planned in the segment before.
    let from = first.saturating_sub(1);
    let mut replay = Replay::new(of, pages.segments[from].opening.clone());
    for segment in &pages.segments[from..] {
        for entry in &segment.entries {
            replay.take(entry);
            if replay.is_over() {
                return replay.found;
            }
        }
    }
    for (seq, sent) in &pages.flying {
        replay.under_way(*seq, *sent);
    }
    if let Some(since) = replay.down_since {
        replay.found.down.push((since, pages.now));
    }
    replay.found
}

struct Replay {
    of: RequestId,
    seats: Seats,
    /// Where it sits.
    row: Option<Row>,
    present: bool,
    found: Found,
    home: ShardId,
    heads: BTreeMap<ShardId, (RequestId, Waits)>,
    stalled: Option<Waits>,
    /// Chunks of the plan that is being read.
    chunks: Vec<(Row, Tokens, bool)>,
    last_answered: Timestamp,
    planned_once: bool,
    down_since: Option<Timestamp>,
    /// Own steps so far, and where in them others began to decode.
    shared: u32,
    since: BTreeMap<RequestId, u32>,
}

impl Replay {
    fn new(of: RequestId, seats: Seats) -> Self {
        let since = seats.seated().filter(|seat| seat.decoding).map(|seat| (seat.request, 0));
        Self {
            of,
            row: seats.row_of(of),
            present: seats.row_of(of).is_some(),
            since: since.collect(),
            seats,
            found: Found::default(),
            home: ShardId(0),
            heads: BTreeMap::new(),
            stalled: None,
            chunks: Vec::new(),
            last_answered: Timestamp::ZERO,
            planned_once: false,
            down_since: None,
            shared: 0,
        }
    }

    /// Whether nothing about the request can follow.
    fn is_over(&self) -> bool {
        let settled = |slice: &Slice| slice.end.is_some() || slice.lost.is_some();
        self.found.finished.is_some() && self.found.slices.iter().rev().all(settled)
    }

    fn take(&mut self, entry: &Entry) {
        match *entry {
            Entry::Submitted { request, arrival, prompt } if request == self.of => {
                self.present = true;
                self.found.arrival = Some(arrival);
                self.found.prompt = prompt;
            }
            Entry::Admitted { request, row, known, cached } if request == self.of => {
                self.present = true;
                self.row = Some(row);
                self.home = row.shard;
                if self.found.prompt.is_zero() {
                    self.found.prompt = known;
                }
                self.found.cached.get_or_insert(cached);
            }
            Entry::Finished { request, at, by, output } if request == self.of => {
                self.present = false;
                self.stop_all();
                self.found.finished = Some((at, by, output));
            }
            Entry::Submitted { .. } | Entry::Admitted { .. } | Entry::Finished { .. } => {}
            Entry::Placed(request, shard) => {
                if request == self.of {
                    self.home = shard;
                }
            }
            Entry::Head(shard, request, waits) => {
                self.heads.insert(shard, (request, waits));
                if request == self.of {
                    self.present = true;
                    self.home = shard;
                }
                self.look();
            }
            Entry::NoHead(shard) => {
                self.heads.remove(&shard);
            }
            Entry::Stalled(request, waits) => {
                self.stalled = self.stalled.or((request == self.of).then_some(waits));
            }
            Entry::Unseated(request, at) => {
                if request == self.of {
                    for slice in self.open() {
                        slice.unseated = Some(at);
                    }
                }
            }
            Entry::Vacated(row) => {
                if let Some(seat) = self.seats.get(row) {
                    self.stop(seat.request);
                }
                if self.row == Some(row) {
                    self.row = None;
                    self.found.preemptions += u32::from(self.present);
                }
            }
            Entry::Left(row) => {
                if let Some(seat) = self.seats.get(row) {
                    self.stop(seat.request);
                }
            }
            Entry::Joined(row) => {
                if let Some(seat) = self.seats.get(row) {
                    self.since.entry(seat.request).or_insert(self.shared);
                }
            }
            Entry::Chunk { row, tokens, sample } => self.chunks.push((row, tokens, sample)),
            Entry::Planned(plan) => self.planned(plan),
            Entry::Ended(end) => self.ended(end),
            Entry::Ready(at) => {
                let since = self.down_since.take();
                let never = (!self.planned_once).then_some(Timestamp::ZERO);
                self.found.down.extend(since.or(never).map(|since| (since, at)));
            }
            Entry::Lost(at) => self.lost(at),
        }
        self.seats.apply(entry);
    }

    fn planned(&mut self, plan: Plan) {
        self.planned_once = true;
        let chunks = core::mem::take(&mut self.chunks);
        let stalled = self.stalled.take();
        let share = if self.present {
            self.share(&chunks, stalled)
        } else if self.found.finished.is_some() {
            return;
        } else {
            Share::Before
        };
        let mut beside = Vec::new();
        if matches!(share, Share::Chunk { .. } | Share::Decode) {
            for (row, tokens, _) in chunks.iter().filter(|chunk| Some(chunk.0) != self.row) {
                let Some(seat) = self.seats.get(*row) else { continue };
                beside.push((seat.request, *tokens));
                if !seat.decoding {
                    *self.found.mates.entry(seat.request).or_default() += 1;
                }
            }
            self.shared += 1;
            self.found.waits = None;
        } else if share != Share::Before {
            self.found.waits = Some(share.clone());
        }
        if share == Share::Before {
            // Only those that are still under way when it comes concern it.
            self.found.slices.retain(|slice| slice.end.is_none() && slice.lost.is_none());
        }
        self.found.slices.push(Slice {
            plan,
            share,
            beside,
            end: None,
            start: None,
            lost: None,
            unseated: None,
        });
    }

    fn share(&self, chunks: &[(Row, Tokens, bool)], stalled: Option<Waits>) -> Share {
        let Some(row) = self.row else { return Share::InLine(self.in_line()) };
        if let Some((_, tokens, sample)) = chunks.iter().find(|chunk| chunk.0 == row) {
            return Share::Chunk { tokens: *tokens, sample: *sample };
        }
        let decodes = self.seats.get(row).is_some_and(|seat| seat.decoding);
        match stalled {
            Some(waits) => Share::Stalled(waits),
            None if decodes => Share::Decode,
            // All that it may run is launched.
            None => Share::InLine(Wait::Outcome),
        }
    }

    fn in_line(&self) -> Wait {
        match self.heads.get(&self.home) {
            Some((head, waits)) if *head == self.of => Wait::For(*waits),
            Some((head, waits)) => Wait::Behind { head: *head, waits: *waits },
            None => Wait::NextPlan,
        }
    }

    fn look(&mut self) {
        if self.present && self.row.is_none() {
            self.found.waits = Some(Share::InLine(self.in_line()));
        }
    }

    fn ended(&mut self, end: End) {
        let start = end.sent.max(self.last_answered);
        self.last_answered = end.answered;
        let of_it = |slice: &&mut Slice| slice.plan.seq == end.seq && slice.lost.is_none();
        if let Some(slice) = self.found.slices.iter_mut().rev().find(of_it) {
            slice.start = Some(start);
            slice.end = Some(end);
        }
    }

    fn under_way(&mut self, seq: StepSeq, sent: Timestamp) {
        let start = sent.max(self.last_answered);
        let open = |slice: &&mut Slice| slice.plan.seq == seq && slice.end.is_none();
        if let Some(slice) = self.found.slices.iter_mut().rev().find(open) {
            slice.start = Some(start);
        }
    }

    /// Those under way, the newest first.
    fn open(&mut self) -> impl Iterator<Item = &mut Slice> {
        let open = |slice: &&mut Slice| slice.end.is_none() && slice.lost.is_none();
        self.found.slices.iter_mut().rev().take_while(open)
    }

    fn lost(&mut self, at: Timestamp) {
        for slice in self.open() {
            slice.lost = Some(at);
            slice.start = Some(slice.plan.at);
        }
        self.down_since.get_or_insert(at);
        self.last_answered = at;
        self.row = None;
        let decoding: Vec<RequestId> = self.since.keys().copied().collect();
        decoding.into_iter().for_each(|request| self.stop(request));
        self.found.waits = self.present.then_some(Share::InLine(Wait::For(Waits::Worker)));
    }

    /// A request decodes no more.
    fn stop(&mut self, request: RequestId) {
        if let Some(from) = self.since.remove(&request) {
            let steps = self.shared - from;
            if steps > 0 && request != self.of {
                *self.found.mates.entry(request).or_default() += steps;
            }
        }
    }

    fn stop_all(&mut self) {
        let decoding: Vec<RequestId> = self.since.keys().copied().collect();
        decoding.into_iter().for_each(|request| self.stop(request));
    }
}
