//! A cache on the device and a plan over it, for tests of attention.

use super::Device;
use crate::cuda::{Dtype, Tensor};
use crate::flash::cuda::{Plan, Segment, Variant, max_tiles, tiles};
use crate::paged::{BLOCK, KvLayer};
use crate::testing::Random;
use core::ops::Range;
use device::cuda::DeviceSlice;

/// Sequences in scattered blocks, everything around them NaN.
pub(crate) struct Cache {
    pub(crate) dtype: Dtype,
    pub(crate) arena: Vec<f32>,
    pub(crate) layer: KvLayer,
    /// KV rows of every sequence, as the device has them.
    pub(crate) contents: Vec<Vec<f32>>,
    pub(crate) tables: Vec<u64>,
    pub(crate) segments: Vec<Segment>,
}

impl Cache {
    /// Sequences of `(rows of this step, context)`.
    pub(crate) fn new(sequences: &[(usize, usize)], row: usize, dtype: Dtype, seed: u64) -> Self {
        let layer = KvLayer { offset: 8, row };
        let block = (layer.offset + BLOCK * row + 8).next_multiple_of(8);
        Self::laid(sequences, layer, block, dtype, seed)
    }

    /// The same with layer and blocks on multiples of a row.
    pub(crate) fn whole_rows(
        sequences: &[(usize, usize)],
        row: usize,
        dtype: Dtype,
        seed: u64,
    ) -> Self {
        let layer = KvLayer { offset: 3 * row, row };
        Self::laid(sequences, layer, (BLOCK + 5) * row, dtype, seed)
    }

    fn laid(
        sequences: &[(usize, usize)],
        layer: KvLayer,
        block: usize,
        dtype: Dtype,
        seed: u64,
    ) -> Self {
        let row = layer.row;
        let total: usize = sequences.iter().map(|s| s.1.div_ceil(BLOCK)).sum();
        let mut random = Random::new(seed);
        let mut free: Vec<u64> = (0..total as u64).map(|b| b * block as u64).collect();
        for i in (1..free.len()).rev() {
            free.swap(i, random.below(i + 1));
        }
        let mut cache = Self {
            dtype,
            arena: vec![f32::NAN; total * block],
            layer,
            contents: Vec::new(),
            tables: Vec::new(),
            segments: Vec::new(),
        };
        let mut start = 0;
        for (len, context) in sequences {
            let table = cache.tables.len();
            cache.tables.extend((0..context.div_ceil(BLOCK)).filter_map(|_| free.pop()));
            let content = super::rounded(&random.vector(context * row), dtype);
            for (position, kv) in content.chunks_exact(row).enumerate() {
                let at = cache.at(table, position);
                cache.arena[at..at + row].copy_from_slice(kv);
            }
            cache.contents.push(content);
            cache.segments.push(Segment {
                start,
                len: *len as u32,
                context: *context as u32,
                table: table as u32,
            });
            start += *len as u32;
        }
        cache
    }

    /// Sequences whose rows are zero, but that of the elements `marks` one is set in each: of the position
    /// `t` the one at `t` modulo their number. Attention that weighs all keys alike counts them.
    pub(crate) fn counting(sequences: &[(usize, usize)], row: usize, marks: Range<usize>) -> Self {
        let mut cache = Self::whole_rows(sequences, row, Dtype::Bf16, 1);
        for (segment, content) in cache.segments.clone().iter().zip(0..) {
            for position in 0..segment.context as usize {
                let mut kv = vec![0.0; row];
                kv[marks.start + position % marks.len()] = 1.0;
                let at = cache.at(segment.table as usize, position);
                cache.arena[at..at + row].copy_from_slice(&kv);
                cache.contents[content][position * row..][..row].copy_from_slice(&kv);
            }
        }
        cache
    }

    /// Element of the arena where a position of the sequence with that table begins.
    pub(crate) fn at(&self, table: usize, position: usize) -> usize {
        let block = self.tables[table + position / BLOCK] as usize;
        block + self.layer.offset + position % BLOCK * self.layer.row
    }

    pub(crate) fn rows(&self) -> usize {
        self.segments.iter().map(|s| s.len as usize).sum()
    }

    pub(crate) fn send(&self, device: &Device, group: usize, lines: usize) -> Sent {
        let mut list = Vec::new();
        tiles(&self.segments, group, lines, &mut list);
        Sent {
            arena: device.send_as(&self.arena, self.dtype),
            dtype: self.dtype,
            segments: device.send(&self.segments),
            tiles: {
                let most = max_tiles(self.rows(), self.segments.len(), group, lines);
                let real = list.len();
                // Tiles beyond the count must not be looked at.
                let nonsense = crate::flash::cuda::Tile { segment: u32::MAX, line: u32::MAX };
                list.resize(most.max(real), nonsense);
                (device.send(&list), device.send(&[real as u32]), list.len())
            },
            tables: device.send(&self.tables),
        }
    }
}

/// A cache and its segments on the device.
pub(crate) struct Sent {
    arena: DeviceSlice,
    dtype: Dtype,
    segments: DeviceSlice,
    tiles: (DeviceSlice, DeviceSlice, usize),
    tables: DeviceSlice,
}

impl Sent {
    pub(crate) fn arena(&self) -> Tensor<'_> {
        Tensor::new(&self.arena, self.dtype)
    }

    pub(crate) fn tables(&self) -> &DeviceSlice {
        &self.tables
    }

    pub(crate) fn plan(&self, variant: Variant, splits: usize) -> Plan<'_> {
        Plan {
            segments: &self.segments,
            tiles: &self.tiles.0,
            tile_count: &self.tiles.1,
            max_tiles: self.tiles.2,
            tables: &self.tables,
            splits,
            variant,
        }
    }
}

/// Asserts that a row which sees so many keys of [`Cache::counting`] counted each of them once; `got` are
/// its values of all marks.
pub(crate) fn assert_counted(what: &str, got: &[f32], keys: usize) {
    let marks = got.len();
    for (mark, got) in got.iter().enumerate() {
        let expected = keys / marks + usize::from(mark < keys % marks);
        let counted = f64::from(*got) * keys as f64;
        // A result is rounded to 2^-9 of itself: a quarter of a key where it has 128.
        let off = (counted - expected as f64).abs();
        assert!(off < 0.5, "{what}: {counted} of {expected} keys with mark {mark}");
    }
}

/// Ragged steps: `(rows of this step, context)`.
pub(crate) const RAGGED: [(usize, usize); 12] = [
    (1, 1),
    (1, 63),
    (1, 64),
    (1, 65),
    (3, 3),
    (3, 66),
    (7, 130),
    (63, 63),
    (64, 64),
    (65, 129),
    (129, 129),
    (2, 513),
];
/// On both sides of 64k tokens.
pub(crate) const AROUND_64K: [usize; 3] = [65_535, 65_536, 65_537];
/// Long contexts.
pub(crate) const LONG: [(usize, usize); 4] = [(1, 4097), (5, 3000), (1, 2), (1, 7000)];

/// What [`assert_counted`] is for: roundings of a right count pass, a key too few or twice does not.
#[test]
fn a_key_too_few_or_twice_is_noticed() {
    let values = |keys: usize, at_7: f32| -> Vec<f32> {
        let counted = (0..512).map(|mark| (keys / 512 + usize::from(mark < keys % 512)) as f32);
        let off = counted.enumerate().map(|(mark, n)| if mark == 7 { n + at_7 } else { n });
        super::rounded(&off.map(|n| n / keys as f32).collect::<Vec<_>>(), Dtype::Bf16)
    };
    for keys in AROUND_64K {
        assert_counted("all", &values(keys, 0.0), keys);
        for off in [-1.0, 1.0] {
            let noticed = std::panic::catch_unwind(|| {
                assert_counted("not all", &values(keys, off), keys);
            });
            assert!(noticed.is_err(), "{keys} keys and {off}");
        }
    }
}
