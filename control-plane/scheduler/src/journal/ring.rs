//! Where entries are kept: segments of fixed size, the oldest written over.
//!
//! A segment opens with the slot table as it was, so that reading can begin at any of them. Full ones
//! do not change any more and are shared with readers, who cost the writer a copy of the newest alone.
//! Invariant: nothing is allocated after [`Ring::new`] unless a reader still holds what is to be
//! written over.

use super::entry::{Entry, Row};
use ids::{RequestId, ShardId};
use std::collections::VecDeque;
use std::sync::Arc;

/// Entries of a segment.
const SEGMENT: usize = 1024;
/// Fewer could not hold what one step does to a full slot table.
const SEGMENTS_LEAST: usize = 4;

/// Who sits in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Occupant {
    pub(crate) request: RequestId,
    pub(crate) decoding: bool,
}

/// Slot tables of all shards.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seats {
    /// Of one shard.
    rows: usize,
    all: Vec<Option<Occupant>>,
}

impl Seats {
    fn new(rows: usize, shards: usize) -> Self {
        Self { rows, all: vec![None; rows * shards] }
    }

    fn index(&self, row: Row) -> usize {
        row.shard.index() * self.rows + row.slot as usize
    }

    pub(crate) fn get(&self, row: Row) -> Option<Occupant> {
        self.all.get(self.index(row)).copied().flatten()
    }

    pub(crate) fn set(&mut self, row: Row, occupant: Option<Occupant>) {
        let at = self.index(row);
        if let Some(place) = self.all.get_mut(at) {
            *place = occupant;
        }
    }

    /// Everyone who has a seat.
    pub(crate) fn seated(&self) -> impl Iterator<Item = Occupant> {
        self.all.iter().flatten().copied()
    }

    /// Where a request sits.
    pub(crate) fn row_of(&self, request: RequestId) -> Option<Row> {
        let sits = |seat: &Option<Occupant>| seat.is_some_and(|seat| seat.request == request);
        let at = self.all.iter().position(sits)?;
        let shard = ShardId(u16::try_from(at / self.rows).ok()?);
        Some(Row { shard, slot: u32::try_from(at % self.rows).ok()? })
    }

    /// What an entry does to the tables.
    pub(crate) fn apply(&mut self, entry: &Entry) {
        match *entry {
            Entry::Admitted { request, row, .. } => {
                self.set(row, Some(Occupant { request, decoding: false }));
            }
            Entry::Vacated(row) => self.set(row, None),
            Entry::Joined(row) | Entry::Left(row) => {
                let decoding = matches!(entry, Entry::Joined(_));
                self.set(row, self.get(row).map(|old| Occupant { decoding, ..old }));
            }
            Entry::Lost(_) => self.all.fill(None),
            Entry::Submitted { .. }
            | Entry::Placed(..)
            | Entry::Unseated(..)
            | Entry::Head(..)
            | Entry::NoHead(_)
            | Entry::Stalled(..)
            | Entry::Chunk { .. }
            | Entry::Planned(_)
            | Entry::Ended(_)
            | Entry::Finished { .. }
            | Entry::Ready(_) => {}
        }
    }

    fn copy_from(&mut self, other: &Self) {
        self.rows = other.rows;
        self.all.clone_from(&other.all);
    }
}

/// Entries in order, with the slot tables before the first of them.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    pub(crate) opening: Seats,
    pub(crate) entries: Vec<Entry>,
}

impl Segment {
    fn new(seats: &Seats) -> Self {
        Self { opening: seats.clone(), entries: Vec::with_capacity(SEGMENT) }
    }

    fn bytes(seats: &Seats) -> usize {
        SEGMENT * size_of::<Entry>() + size_of_val(&*seats.all)
    }
}

/// The ring.
#[derive(Debug)]
pub(crate) struct Ring {
    /// Full, oldest first.
    full: VecDeque<Arc<Segment>>,
    /// Never used yet.
    spare: Vec<Arc<Segment>>,
    newest: Arc<Segment>,
    seats: Seats,
}

impl Ring {
    /// A ring of about so many bytes, for so many slot tables of so many rows.
    pub(crate) fn new(bytes: usize, rows: usize, shards: usize) -> Self {
        let seats = Seats::new(rows, shards);
        let count = (bytes / Segment::bytes(&seats)).max(SEGMENTS_LEAST);
        let segment = || Arc::new(Segment::new(&seats));
        Self {
            full: VecDeque::with_capacity(count),
            spare: (1..count).map(|_| segment()).collect(),
            newest: segment(),
            seats,
        }
    }

    /// Bytes that it may hold.
    pub(crate) fn bytes(&self) -> usize {
        (self.full.len() + self.spare.len() + 1) * Segment::bytes(&self.seats)
    }

    pub(crate) fn push(&mut self, entry: Entry) {
        if self.newest.entries.len() == SEGMENT {
            self.turn();
        }
        self.seats.apply(&entry);
        // Only segments that are full are shared.
        if let Some(newest) = Arc::get_mut(&mut self.newest) {
            newest.entries.push(entry);
        }
    }

    /// Begins the next segment.
    fn turn(&mut self) {
        let next = self.spare.pop().or_else(|| self.full.pop_front());
        let mut next = next.unwrap_or_else(|| Arc::new(Segment::new(&self.seats)));
        if Arc::get_mut(&mut next).is_none() {
            // A reader still looks at it, and keeps it.
            next = Arc::new(Segment::new(&self.seats));
        }
        if let Some(next) = Arc::get_mut(&mut next) {
            next.entries.clear();
            next.opening.copy_from(&self.seats);
        }
        let full = core::mem::replace(&mut self.newest, next);
        self.full.push_back(full);
    }

    /// Who has a seat now.
    pub(crate) fn seats(&self) -> &Seats {
        &self.seats
    }

    /// All there is, as it is now.
    pub(crate) fn read(&self) -> Vec<Arc<Segment>> {
        let newest = Arc::new(Segment::clone(&self.newest));
        self.full.iter().cloned().chain([newest]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ids::{Timestamp, Tokens};

    const ROW: Row = Row { shard: ShardId(1), slot: 1 };

    fn admitted(request: u64) -> Entry {
        let request = RequestId(request);
        Entry::Admitted { request, row: ROW, known: Tokens(1), cached: Tokens(0) }
    }

    #[test]
    fn the_oldest_is_written_over_and_every_segment_opens_with_the_seats() {
        let mut ring = Ring::new(0, 2, 2);
        let bytes = ring.bytes();
        for i in 0..SEGMENT as u64 * 9 {
            ring.push(admitted(i));
        }
        assert_eq!(ring.bytes(), bytes, "no more than at first");
        let segments = ring.read();
        assert_eq!(segments.len(), SEGMENTS_LEAST);
        let first = 5 * SEGMENT as u64;
        assert_eq!(segments[0].entries[0], admitted(first));
        let seated: Vec<_> = segments[0].opening.seated().map(|o| o.request.0).collect();
        assert_eq!(seated, [first - 1]);
    }

    #[test]
    fn a_reader_keeps_what_it_reads() {
        let mut ring = Ring::new(0, 2, 2);
        (0..SEGMENT as u64).for_each(|i| ring.push(admitted(i)));
        ring.push(Entry::Ready(Timestamp::ZERO));
        let held = ring.read();
        (0..SEGMENT as u64 * 9).for_each(|_| ring.push(Entry::Vacated(ROW)));
        assert_eq!(held[0].entries[7], admitted(7));
        assert!(held[1].entries.len() == 1 && held[1].opening.get(ROW).is_some());
        assert_eq!(ring.read().len(), SEGMENTS_LEAST);
    }
}
