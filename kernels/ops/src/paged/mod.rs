//! The paged KV cache as ops see it: one arena, and per sequence the element offset of each of its
//! 64-token blocks.
//!
//! A layer lies inside a block as `[64, row]` at a fixed offset. Ops do not know who owns a block;
//! they check that what a table names lies in the arena. Invariant: token `p` of a sequence is at
//! `table[p / 64] + layer.offset + (p % 64) * layer.row`.

use half::bf16;

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
}

impl KvLayer {
    /// Element where the layer's rows of block `block` start.
    #[inline]
    pub(crate) fn block_start(&self, table: &[u64], block: usize) -> usize {
        usize::try_from(table[block]).expect("an offset fits the address space") + self.offset
    }
}

/// Writes one row per token of each segment: `rows` is `[tokens, layer.row]`.
///
/// # Panics
/// When a row would leave the arena or its table.
pub fn write_kv(rows: &[f32], layer: KvLayer, segments: &[Segment<'_>], arena: &mut KvMut<'_>) {
    for segment in segments {
        for i in 0..segment.len {
            let position = segment.position(i);
            let at =
                layer.block_start(segment.table, position / BLOCK) + position % BLOCK * layer.row;
            let row = (segment.start + i) * layer.row;
            let row = &rows[row..row + layer.row];
            match arena {
                KvMut::F32(arena) => arena[at..at + layer.row].copy_from_slice(row),
                KvMut::Bf16(arena) => {
                    let cells = &mut arena[at..at + layer.row];
                    cells.iter_mut().zip(row).for_each(|(y, x)| *y = bf16::from_f32(*x));
                }
            }
        }
    }
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
    #[should_panic(expected = "out of range")]
    fn a_block_outside_of_the_arena_is_refused() {
        let layer = KvLayer { offset: 0, row: 1 };
        let segment = Segment { start: 0, len: 1, context: 1, table: &[64] };
        write_kv(&[1.0], layer, &[segment], &mut KvMut::F32(&mut [0.0; 64]));
    }
}
