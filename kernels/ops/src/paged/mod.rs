//! The paged KV cache as ops see it: one arena, and per sequence the element offset of each of its
//! 64-token blocks.
//!
//! A layer lies inside a block as `[64, row]` at a fixed offset. Ops do not know who owns a block;
//! they check that what a table names lies in the arena. Invariant: token `p` of a sequence is at
//! `table[p / 64] + layer.offset + (p % 64) * layer.row`.

pub mod cuda;

use half::bf16;
use std::ops::Range;

/// Tokens of a block.
pub const BLOCK: usize = 64;

/// The arena, to read.
#[derive(Clone, Copy, Debug)]
pub enum Kv<'a> {
    /// 4 bytes an element.
    F32(&'a [f32]),
    /// 2 bytes an element.
    Bf16(&'a [bf16]),
}

/// The arena, to write.
#[derive(Debug)]
pub enum KvMut<'a> {
    /// 4 bytes an element.
    F32(&'a mut [f32]),
    /// 2 bytes an element; values are rounded to nearest even.
    Bf16(&'a mut [bf16]),
}

impl KvMut<'_> {
    /// Elements.
    const fn len(&self) -> usize {
        match self {
            Self::F32(arena) => arena.len(),
            Self::Bf16(arena) => arena.len(),
        }
    }
}

/// Where a layer lies in a block, in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayer {
    /// From the block's start to the layer's first row.
    pub offset: usize,
    /// Elements of one token.
    pub row: usize,
}

/// Consecutive tokens of one sequence in a batch.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// First row in the batch.
    pub start: usize,
    /// Rows.
    pub len: usize,
    /// Tokens with KV once this step's rows are written, the rows included.
    pub context: usize,
    /// Element offset of each block of the sequence; entries before a sliding window are not read.
    pub table: &'a [u64],
}

impl Segment<'_> {
    /// Position of the segment's row `i` in its sequence.
    #[must_use]
    pub fn position(&self, i: usize) -> usize {
        self.context - self.len + i
    }

    /// Panics where a segment is not what it claims to be.
    pub(crate) fn check(&self, tokens: usize) {
        let Self { start, len, context, table } = *self;
        assert!(
            start.checked_add(len).is_some_and(|end| end <= tokens),
            "rows {start} + {len} of a batch of {tokens}"
        );
        assert!(len <= context, "{len} rows end a context of {context} tokens");
        let blocks = context.div_ceil(BLOCK);
        assert!(table.len() >= blocks, "{blocks} blocks of {context} tokens, got {}", table.len());
    }
}

impl KvLayer {
    /// The elements of one block of the layer, checked against an arena of `len` elements.
    ///
    /// # Panics
    /// When the table has no such block, or the block leaves the arena.
    #[inline]
    pub(crate) fn block(&self, len: usize, table: &[u64], block: usize) -> Range<usize> {
        let Some(&offset) = table.get(block) else {
            panic!("block {block} of a table of {} blocks", table.len());
        };
        let start = usize::try_from(offset).ok().and_then(|at| at.checked_add(self.offset));
        let end = start.and_then(|at| at.checked_add(BLOCK * self.row));
        match (start, end) {
            (Some(start), Some(end)) if end <= len => start..end,
            _ => panic!("{self:?} of the block at {offset} leaves the arena of {len} elements"),
        }
    }
}

/// Writes one row per token of each segment: `rows` is `[tokens, layer.row]`.
///
/// Blocks that several segments name are shared prefixes and written by none of them; that is the
/// promise of whoever owns the blocks, and breaking it costs wrong values, never memory safety.
///
/// # Panics
/// When a row would leave the arena or its table.
pub fn write_kv(rows: &[f32], layer: KvLayer, segments: &[Segment<'_>], arena: &mut KvMut<'_>) {
    for segment in segments {
        segment.check(rows.len() / layer.row.max(1));
        let mut i = 0;
        while i < segment.len {
            let position = segment.position(i);
            // The rows that go to one block lie side by side on both sides.
            let count = (BLOCK - position % BLOCK).min(segment.len - i);
            let from = (segment.start + i) * layer.row;
            let from = &rows[from..from + count * layer.row];
            let block = layer.block(arena.len(), segment.table, position / BLOCK);
            let to = block.start + position % BLOCK * layer.row;
            let to = to..to + from.len();
            match arena {
                KvMut::F32(arena) => arena[to].copy_from_slice(from),
                KvMut::Bf16(arena) => {
                    let cells = &mut arena[to];
                    cells.iter_mut().zip(from).for_each(|(y, x)| *y = narrow(*x));
                }
            }
            i += count;
        }
    }
}

/// Rounds to nearest, ties to even, without a branch; NaN stays a quiet NaN.
#[inline]
fn narrow(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
    let quiet = bits >> 16 | 0x40;
    bf16::from_bits(if x.is_nan() { quiet } else { rounded } as u16)
}

#[cfg(test)]
pub(crate) mod testing {
    //! A cache with scattered blocks, for the tests of attention.

    use super::*;
    use crate::testing::Random;

    /// A sequence's blocks in an arena shuffled with others.
    pub(crate) struct Cache {
        pub(crate) arena: Vec<f32>,
        pub(crate) tables: Vec<Vec<u64>>,
        pub(crate) layer: KvLayer,
    }

    impl Cache {
        /// Sequences of the given lengths, KV random, every other element of the arena NaN.
        pub(crate) fn random(lengths: &[usize], row: usize, seed: u64) -> (Self, Vec<Vec<f32>>) {
            let layer = KvLayer { offset: 5, row };
            let block = 5 + BLOCK * row + 3;
            let total: usize = lengths.iter().map(|l| l.div_ceil(BLOCK)).sum();
            let mut random = Random::new(seed);
            let mut free: Vec<u64> = (0..total as u64).map(|b| b * block as u64).collect();
            for i in (1..free.len()).rev() {
                free.swap(i, random.below(i + 1));
            }
            let tables: Vec<Vec<u64>> = lengths
                .iter()
                .map(|l| (0..l.div_ceil(BLOCK)).filter_map(|_| free.pop()).collect())
                .collect();
            let mut cache = Self { arena: vec![f32::NAN; total * block], tables, layer };
            let contents: Vec<Vec<f32>> =
                lengths.iter().map(|length| random.vector(length * row)).collect();
            for (content, table) in contents.iter().zip(&cache.tables) {
                let len = content.len() / row;
                let segment = Segment { start: 0, len, context: len, table };
                write_kv(content, layer, &[segment], &mut KvMut::F32(&mut cache.arena));
            }
            (cache, contents)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_go_where_the_table_says_and_nowhere_else() {
        let layer = KvLayer { offset: 2, row: 3 };
        let mut arena = vec![0.0_f32; 3 * 200];
        let table = [400, 0];
        let rows: Vec<f32> = (1..=9).map(|x| x as f32).collect();
        let segment = Segment { start: 1, len: 2, context: 65, table: &table };
        write_kv(&rows, layer, &[segment], &mut KvMut::F32(&mut arena));
        assert_eq!(arena[400 + 2 + 63 * 3..][..3], [4.0, 5.0, 6.0]);
        assert_eq!(arena[2..5], [7.0, 8.0, 9.0]);
        assert_eq!(arena.iter().filter(|x| **x != 0.0).count(), 6);
    }

    #[test]
    #[should_panic(expected = "leaves the arena of 64 elements")]
    fn a_block_outside_of_the_arena_is_refused() {
        let layer = KvLayer { offset: 0, row: 1 };
        let segment = Segment { start: 0, len: 1, context: 1, table: &[64] };
        write_kv(&[1.0], layer, &[segment], &mut KvMut::F32(&mut [0.0; 64]));
    }

    #[test]
    #[should_panic(expected = "leaves the arena of 64 elements")]
    fn an_offset_that_overflows_is_refused() {
        let layer = KvLayer { offset: 64, row: 1 };
        let segment = Segment { start: 0, len: 1, context: 1, table: &[u64::MAX - 10] };
        write_kv(&[1.0], layer, &[segment], &mut KvMut::F32(&mut [0.0; 64]));
    }

    #[test]
    #[should_panic(expected = "2 blocks of 65 tokens, got 1")]
    fn a_table_that_is_too_short_is_refused() {
        let layer = KvLayer { offset: 0, row: 1 };
        let segment = Segment { start: 0, len: 1, context: 65, table: &[0] };
        write_kv(&[1.0], layer, &[segment], &mut KvMut::F32(&mut [0.0; 64]));
    }

    #[test]
    fn chunks_of_any_length_land_where_single_rows_do() {
        let layer = KvLayer { offset: 1, row: 2 };
        let table = [300, 0, 150];
        let rows: Vec<f32> = (1..=2 * 150).map(|x| x as f32).collect();
        let mut whole = vec![0.0; 450];
        let segment = Segment { start: 0, len: 150, context: 150, table: &table };
        write_kv(&rows, layer, &[segment], &mut KvMut::F32(&mut whole));
        for chunk in [1, 3, 63, 64, 65, 129] {
            let mut parts = vec![0.0; 450];
            for start in (0..150).step_by(chunk) {
                let len = chunk.min(150 - start);
                let segment = Segment { start, len, context: start + len, table: &table };
                write_kv(&rows, layer, &[segment], &mut KvMut::F32(&mut parts));
            }
            assert_eq!(parts, whole, "{chunk}");
        }
        assert_eq!(whole.iter().filter(|x| **x != 0.0).count(), rows.len());
    }

    #[test]
    fn narrowing_is_the_rounding_of_the_format() {
        let mut random = crate::testing::Random::new(6);
        let specials = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN_POSITIVE];
        let ties = [0x3F80_8000, 0x3F81_8000, 0x3F80_8001, 1, 0x7F7F_8000].map(f32::from_bits);
        let any = (0..10_000).map(|_| f32::from_bits(random.next() as u32));
        for x in specials.into_iter().chain(ties).chain(any) {
            let (got, expected) = (narrow(x), bf16::from_f32(x));
            assert_eq!(got.to_bits(), expected.to_bits(), "{x:e}");
        }
    }
}
