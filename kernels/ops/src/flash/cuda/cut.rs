//! The keys of decoding rows cut into pieces of equal work, once a step for all layers, on the host,
//! because contexts are known there.
//!
//! It computes no attention. Invariant: the pieces of a row cover its keys once, and a piece names no
//! row of another sequence.

use super::Segment;
use crate::paged::BLOCK;

/// Keys of one copy; pieces begin on multiples.
pub(crate) const UNIT: u32 = 16;
/// A row's slot where its result is not partial.
const WHOLE: u32 = u32::MAX;

/// What one row is cut into before its keys are: lines, each some query heads that share keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lines {
    /// Query heads of a row.
    pub heads: usize,
    /// Those that share keys.
    pub group: usize,
    /// Those of a line, at most.
    pub most: usize,
    /// Those of a partial result's slot: as many as of a line, or a part of them that divides it.
    pub slot: usize,
    /// Whether pieces begin on blocks of the cache.
    pub whole: bool,
    /// What pieces of them cost.
    pub costs: Costs,
}

/// What pieces cost beside their keys, in the time that a block takes for [`UNIT`] keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Costs {
    /// Beginning a piece.
    pub piece: u32,
    /// Writing and merging a partial result, on top.
    pub partial: u32,
    /// Waiting for all partial results of a row.
    pub merge: u32,
}

impl Lines {
    /// Lines of a row.
    #[must_use]
    pub const fn of_row(&self) -> usize {
        let kv_heads = self.heads / if self.group == 0 { 1 } else { self.group };
        kv_heads * self.group.div_ceil(self.most)
    }

    /// Slots of a row, of one piece of each line.
    #[must_use]
    pub const fn slots_of_row(&self) -> usize {
        let kv_heads = self.heads / if self.group == 0 { 1 } else { self.group };
        kv_heads * self.group.div_ceil(self.slot)
    }

    /// Slots of a line.
    const fn slots(&self) -> usize {
        self.most / self.slot
    }

    /// Each line's first head, its heads, and the KV head.
    fn each(self) -> impl Iterator<Item = (u32, u32, u32)> {
        let Self { heads, group, most, .. } = self;
        (0..heads / group.max(1)).flat_map(move |kv| {
            (0..group).step_by(most).map(move |first| {
                let lines = (group - first).min(most);
                ((kv * group + first) as u32, lines as u32, kv as u32)
            })
        })
    }
}

/// Mirrors `Piece` in `pieces.cuh`: keys of one row, for the query heads of a line.
#[repr(C, align(16))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    at: [u64; 2],
    row: u32,
    table: u32,
    begin: u32,
    end: u32,
    settled: u32,
    slot: u32,
    next: u32,
    head: u32,
    first: u32,
    count: u32,
    lines: u32,
    kv_head: u32,
}

impl Piece {
    /// Words of 32 bits.
    pub const WORDS: usize = size_of::<Self>() / 4;

    /// As the device has it.
    #[must_use]
    pub const fn words(&self) -> [u32; Self::WORDS] {
        let Self { at: [a, b], row, table, begin, end, settled, slot, next, .. } = *self;
        let Self { head, first, count, lines, kv_head, .. } = *self;
        let at = [a as u32, (a >> 32) as u32, b as u32, (b >> 32) as u32];
        [
            at[0], at[1], at[2], at[3], row, table, begin, end, settled, slot, next, head, first,
            count, lines, kv_head,
        ]
    }
}

/// The cut of a step.
#[derive(Clone, Debug, Default)]
pub struct Cut {
    /// The first of every block, then the others.
    pub pieces: Vec<Piece>,
    /// Of every row of the step and heads of it that a slot has: its first slot, and how many; 0 where it
    /// has one piece, or none.
    pub slots: Vec<[u32; 2]>,
    /// The last piece of every block.
    last: Vec<u32>,
    /// Of the line at hand.
    parts: Vec<Part>,
}

/// Block, first key, end.
type Part = (u32, u32, u32);

/// One line of a row.
#[derive(Clone, Copy)]
struct Line {
    row: u32,
    head: u32,
    lines: u32,
    kv_head: u32,
    context: u32,
    settled: u32,
    table: u32,
}

impl Line {
    const fn units(&self) -> u32 {
        self.context.div_ceil(UNIT)
    }

    /// Among those of its row.
    const fn first_slot(&self, of: Lines) -> usize {
        let (head, kv_head) = (self.head as usize, self.kv_head as usize);
        kv_head * of.group.div_ceil(of.slot) + (head - kv_head * of.group) / of.slot
    }
}

fn lines(segments: &[Segment], of: Lines) -> impl Iterator<Item = Line> {
    segments.iter().flat_map(move |segment| {
        let Segment { start, len, context, table } = *segment;
        let settled = context - len;
        (0..len).flat_map(move |i| {
            of.each().map(move |(head, lines, kv_head)| Line {
                row: start + i,
                head,
                lines,
                kv_head,
                context: settled + i + 1,
                settled,
                table,
            })
        })
    })
}

impl Cut {
    /// With room for steps of `rows` rows of which up to `decodes` are cut.
    #[must_use]
    pub fn with_capacity(rows: usize, decodes: usize, of: Lines, blocks: usize) -> Self {
        let (pieces, slots) = Self::most(decodes, of, blocks);
        Self {
            pieces: Vec::with_capacity(pieces),
            slots: Vec::with_capacity(Self::slot_entries(rows, of)),
            last: Vec::with_capacity(blocks),
            parts: Vec::with_capacity(slots),
        }
    }

    /// The most pieces and slots of partial results where `rows` rows are cut for `blocks` blocks.
    #[must_use]
    pub const fn most(rows: usize, of: Lines, blocks: usize) -> (usize, usize) {
        let lines = rows * of.of_row();
        (2 * blocks + lines, (blocks + lines) * of.slots())
    }

    /// Entries of `slots` for steps of `rows` rows.
    #[must_use]
    pub const fn slot_entries(rows: usize, of: Lines) -> usize {
        rows * of.slots_of_row()
    }

    /// Cuts the rows of `segments` (decodes: few rows each) of a step of `rows` rows for `blocks`
    /// blocks. `offset` gives the element offset in an entry of the tables. Allocates nothing
    /// within [`Cut::with_capacity`].
    pub fn make(
        &mut self,
        segments: &[Segment],
        offset: impl Fn(usize) -> Option<u64>,
        rows: usize,
        of: Lines,
        blocks: usize,
    ) {
        let mut parts = std::mem::take(&mut self.parts);
        let room = Room::choose(segments, of, blocks as u32, &mut parts);
        self.pieces.clear();
        self.pieces.resize(blocks, Piece::default());
        self.last.clear();
        self.last.resize(blocks, WHOLE);
        self.slots.clear();
        self.slots.resize(Self::slot_entries(rows, of), [0, 0]);
        let mut slots = 0;
        room.walk(lines(segments, of), &mut parts, |line, parts| {
            let partial = parts.len() > 1;
            let first = slots;
            for &(block, begin, end) in parts {
                let slot = if partial { slots } else { WHOLE };
                slots += u32::from(partial);
                let block_of = |key: u32| (line.table + key / BLOCK as u32) as usize;
                let at = |entry: usize| match entry <= block_of(end - 1) {
                    true => offset(entry).unwrap_or(0),
                    false => 0,
                };
                let piece = Piece {
                    at: [at(block_of(begin)), at(block_of(begin) + 1)],
                    row: line.row,
                    table: line.table,
                    begin,
                    end,
                    settled: line.settled,
                    slot,
                    next: 0,
                    head: line.head,
                    first,
                    count: parts.len() as u32,
                    lines: line.lines,
                    kv_head: line.kv_head,
                };
                self.push(block, piece);
            }
            if partial {
                // Those of the same heads follow each other.
                let (count, each) = (slots - first, of.slots());
                let entry = line.row as usize * of.slots_of_row() + line.first_slot(of);
                let heads = (line.lines as usize).div_ceil(of.slot);
                for (slot, entry) in (0..).zip(&mut self.slots[entry..entry + heads]) {
                    *entry = [first * each as u32 + slot * count, count];
                }
            }
        });
        self.parts = parts;
    }

    fn push(&mut self, block: u32, piece: Piece) {
        let last = &mut self.last[block as usize];
        let place = match *last {
            WHOLE => block,
            before => {
                let place = self.pieces.len() as u32;
                self.pieces[before as usize].next = place;
                place
            }
        };
        *last = place;
        match self.pieces.get_mut(place as usize) {
            Some(first) => *first = piece,
            None => self.pieces.push(piece),
        }
    }
}

/// What a block takes, in units of keys, and whether rows are split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Room {
    units: u32,
    blocks: u32,
    split: bool,
    whole: bool,
    costs: Costs,
}

impl Room {
    /// The smallest in which everything fits, split only where that pays for the second kernel.
    fn choose(segments: &[Segment], of: Lines, blocks: u32, parts: &mut Vec<Part>) -> Self {
        let Lines { costs, whole: grains, .. } = of;
        let (mut total, mut longest, mut count) = (0_u32, 0_u32, 0_u32);
        for line in lines(segments, of) {
            total = total.saturating_add(line.units() + costs.piece);
            longest = longest.max(line.units() + costs.piece);
            count += 1;
        }
        let even = total.div_ceil(blocks.max(1)).max(1);
        let mut fit = |from: u32, split| {
            let mut room = Self { units: from, blocks, split, whole: grains, costs };
            while !room.fits(lines(segments, of), parts) {
                room.units += (room.units / 32).max(1);
            }
            room
        };
        let split = fit(even.max(costs.piece + costs.partial + 1), true);
        if count == 0 || longest.max(even) >= split.units + costs.merge {
            return split;
        }
        let whole = fit(even.max(longest), false);
        if whole.units < split.units + costs.merge { whole } else { split }
    }

    fn fits(self, lines: impl Iterator<Item = Line>, parts: &mut Vec<Part>) -> bool {
        let mut used = 0;
        // A line that finds no place names a block beyond the last, whatever comes after it.
        self.walk(lines, parts, |_, parts| {
            used = parts.last().map_or(used, |part| used.max(part.0))
        });
        used < self.blocks
    }

    /// Calls `each` with the parts (block, first key, end) of every line, in order. A block beyond the
    /// last is named where the room is too small.
    fn walk(
        self,
        lines: impl Iterator<Item = Line>,
        parts: &mut Vec<Part>,
        mut each: impl FnMut(Line, &[Part]),
    ) {
        let Costs { piece, partial, .. } = self.costs;
        // Pieces of whole cache blocks where they are long; short ones for short work.
        let grain = match self.units.saturating_sub(piece + partial) {
            _ if self.whole => BLOCK as u32 / UNIT,
            8.. => BLOCK as u32 / UNIT,
            2.. => 2,
            _ => 1,
        };
        let (mut block, mut used) = (0, 0);
        for line in lines {
            parts.clear();
            let mut begin = 0;
            while begin < line.context {
                let left = (line.context - begin).div_ceil(UNIT);
                let rest = piece + if begin > 0 { partial } else { 0 };
                let room = self.units.saturating_sub(used);
                let cut = room.saturating_sub(piece + partial) / grain * grain;
                if left + rest <= room || (used == 0 && !self.split) {
                    parts.push((block, begin, line.context));
                    used += left + rest;
                    break;
                }
                if self.split && cut > 0 && cut < left {
                    let end = begin + cut * UNIT;
                    parts.push((block, begin, end));
                    begin = end;
                } else if used == 0 {
                    // The room does not even hold a grain.
                    parts.push((u32::MAX, begin, line.context));
                    break;
                }
                block += 1;
                used = 0;
                if block >= self.blocks {
                    parts.push((u32::MAX, begin, line.context));
                    break;
                }
            }
            each(line, parts);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decodes(contexts: &[u32]) -> Vec<Segment> {
        let mut table = 0;
        let mut segments = Vec::new();
        for (start, &context) in (0..).zip(contexts) {
            segments.push(Segment { start, len: 1, context, table });
            table += context.div_ceil(BLOCK as u32);
        }
        segments
    }

    const COSTS: Costs = Costs { piece: 2, partial: 2, merge: 5 };

    const EIGHT: Lines = Lines { heads: 8, group: 8, most: 8, slot: 8, whole: false, costs: COSTS };

    /// All heads share keys, as in latent attention.
    fn shared(heads: usize) -> Lines {
        Lines { heads, group: heads, most: 16, slot: 16, ..EIGHT }
    }

    /// Lines of many heads, their results in slots of 16.
    fn wide(heads: usize) -> Lines {
        let costs = Costs { piece: 4, partial: 4, merge: 8 };
        Lines { most: 64, whole: true, costs, ..shared(heads) }
    }

    fn cut(segments: &[Segment], of: Lines, blocks: usize) -> Cut {
        let tables: Vec<u64> = (0..1 << 20).map(|block| block * 1000).collect();
        let rows = segments.iter().map(|s| s.start + s.len).max().unwrap_or(0) as usize;
        let mut cut = Cut::default();
        cut.make(segments, |at| tables.get(at).copied(), rows + 1, of, blocks);
        assert_eq!(cut.slots.len(), Cut::slot_entries(rows + 1, of));
        cut
    }

    /// Every line's keys once, in order; slots as told; tables of the line. Returns the units of the
    /// fullest block.
    fn check(segments: &[Segment], of: Lines, blocks: usize) -> u32 {
        let cut = cut(segments, of, blocks);
        let rows: u32 = segments.iter().map(|s| s.len).sum();
        let (most, most_slots) = Cut::most(rows as usize, of, blocks);
        assert!(cut.pieces.len() <= most, "{} pieces of {most}", cut.pieces.len());
        let mut all = Vec::new();
        let mut fullest = 0;
        let mut taken = std::collections::BTreeSet::new();
        for block in 0..blocks {
            let mut at = block;
            let mut units = 0;
            loop {
                let piece = cut.pieces[at];
                if piece.end > piece.begin {
                    units += (piece.end - piece.begin).div_ceil(UNIT);
                    all.push(piece);
                }
                match piece.next {
                    0 => break,
                    next => at = next as usize,
                }
            }
            fullest = fullest.max(units);
        }
        for line in lines(segments, of) {
            let of_line = |p: &&Piece| (p.row, p.head) == (line.row, line.head);
            let mut mine: Vec<Piece> = all.iter().filter(of_line).copied().collect();
            mine.sort_by_key(|piece| piece.begin);
            assert_eq!(mine.first().map(|p| p.begin), Some(0));
            assert_eq!(mine.last().map(|p| p.end), Some(line.context));
            for pair in mine.windows(2) {
                assert_eq!(pair[0].end, pair[1].begin);
            }
            let (begin, each) = (line.row as usize * of.slots_of_row(), of.slots() as u32);
            let slots = &cut.slots[begin + line.first_slot(of)..];
            let [first, count] = [slots[0][0] / each, slots[0][1]];
            for (heads, slots) in (0..line.lines.div_ceil(of.slot as u32)).zip(slots) {
                let mine = if count == 0 { [0, 0] } else { [first * each + heads * count, count] };
                assert_eq!(*slots, mine);
                assert!((mine[0]..mine[0] + count).all(|slot| taken.insert(slot)), "slots of two");
                assert!((mine[0] + count) as usize <= most_slots);
            }
            let unit = if of.whole { BLOCK as u32 } else { UNIT };
            for (piece, slot) in mine.iter().zip(first..) {
                assert_eq!(piece.begin % unit, 0);
                let block = piece.begin / BLOCK as u32;
                let second = (piece.end - 1) / BLOCK as u32 > block;
                let entry = |block| u64::from(line.table + block) * 1000;
                assert_eq!(piece.at, [entry(block), if second { entry(block + 1) } else { 0 }]);
                assert_eq!((piece.table, piece.settled), (line.table, line.settled));
                assert_eq!((piece.lines, piece.kv_head), (line.lines, line.kv_head));
                assert_eq!(piece.slot, if count == 0 { WHOLE } else { slot });
                assert_eq!(piece.count, mine.len() as u32);
                assert!(count == 0 || piece.first == first);
            }
            assert_eq!(count, if mine.len() == 1 { 0 } else { mine.len() as u32 });
        }
        fullest
    }

    #[test]
    fn pieces_cover_every_row_once() {
        let ragged: Vec<u32> = (0..77).map(|i| 1 + i * i * 3 % 5000).collect();
        for blocks in [1, 2, 7, 132] {
            for contexts in [&[1_u32][..], &[15, 16, 17], &[8192], &[100_000, 1, 1], &ragged] {
                for heads in [1, 16, 40, 128] {
                    check(&decodes(contexts), shared(heads), blocks);
                }
                for heads in [70, 128, 200] {
                    check(&decodes(contexts), wide(heads), blocks);
                }
                let of = Lines { most: 32, heads: 80, group: 40, ..wide(80) };
                check(&decodes(contexts), of, blocks);
                for (heads, group) in [(8, 1), (6, 3), (32, 4), (18, 9), (16, 16)] {
                    for costs in [COSTS, Costs { piece: 8, partial: 4, merge: 24 }] {
                        let of = Lines { heads, group, costs, ..EIGHT };
                        check(&decodes(contexts), of, blocks);
                    }
                }
            }
        }
        assert_eq!(check(&[], shared(16), 132), 0);
        let several = [
            Segment { start: 0, len: 3, context: 3, table: 0 },
            Segment { start: 3, len: 2, context: 200, table: 1 },
        ];
        check(&several, shared(16), 132);
        // Between the rows of chunks, which are not cut.
        let among = [
            Segment { start: 7, len: 1, context: 5000, table: 0 },
            Segment { start: 300, len: 1, context: 64, table: 90 },
        ];
        check(&among, shared(40), 132);
    }

    #[test]
    fn cutting_stays_within_its_capacity() {
        let (rows, of, blocks) = (64, shared(40), 132);
        let mut cut = Cut::with_capacity(rows, rows, of, blocks);
        let room = |cut: &Cut| {
            [cut.pieces.capacity(), cut.slots.capacity(), cut.last.capacity(), cut.parts.capacity()]
        };
        let before = room(&cut);
        let tables = vec![0_u64; 1 << 17];
        for contexts in [vec![100_000; 64], vec![100_000], vec![1; 64], (1..65).collect()] {
            cut.make(&decodes(&contexts), |at| tables.get(at).copied(), rows, of, blocks);
        }
        assert_eq!(room(&cut), before);
    }

    #[test]
    fn work_is_even_and_rows_are_split_only_where_it_pays() {
        let units = |context: u32, rows: u32| context.div_ceil(UNIT) * rows;
        // One long row goes over all blocks, a whole number of cache blocks each.
        assert_eq!(check(&decodes(&[8192]), shared(16), 132), 4);
        // Many long rows: within a cache block and a few per cent of even.
        for rows in [4_u32, 8, 16, 64, 128] {
            let even = units(8192, rows).div_ceil(132);
            let fullest = check(&decodes(&vec![8192; rows as usize]), shared(16), 132);
            assert!(fullest <= even + even / 16 + 8, "{rows} rows: {fullest} for {even}");
        }
        // Short rows stay whole.
        let short = cut(&decodes(&[256; 256]), shared(16), 132);
        assert!(short.slots.iter().all(|[_, count]| *count == 0));
    }
}
