//! Sequences of a step as ops see them: segments, and blocks of the cache in random order.

use crate::near::Failure;
use crate::rig::{Random, Rig};
use device::cuda::DeviceSlice;
use ops::flash::cuda::Segment;
use ops::paged::BLOCK;

/// Sequences of one length, each with as many rows in the step.
pub(super) struct Step {
    pub(super) segments: Vec<Segment>,
    /// Element offsets of blocks, of all sequences in turn.
    pub(super) tables: Vec<u64>,
    blocks: usize,
    row: usize,
}

impl Step {
    /// `sequences` of `len` rows each at `context` tokens, over cache rows of `row` elements.
    pub(super) fn new(sequences: usize, len: usize, context: usize, row: usize) -> Self {
        let blocks = context.div_ceil(BLOCK);
        let mut free: Vec<u64> = (0..(sequences * blocks) as u64).collect();
        let mut random = Random::new(3);
        let mut next = || free.swap_remove(random.below(free.len())) * (BLOCK * row) as u64;
        let tables = (0..sequences * blocks).map(|_| next()).collect();
        let segment = |i: usize| Segment {
            start: (i * len) as u32,
            len: len as u32,
            context: context as u32,
            table: (i * blocks) as u32,
        };
        Self { segments: (0..sequences).map(segment).collect(), tables, blocks, row }
    }

    /// Rows of the step.
    pub(super) fn rows(&self) -> usize {
        self.segments.iter().map(|segment| segment.len as usize).sum()
    }

    /// Elements of the cache.
    pub(super) fn elements(&self) -> usize {
        self.tables.len() * BLOCK * self.row
    }

    pub(super) fn send_segments(&self, rig: &mut Rig) -> Result<DeviceSlice, Failure> {
        let words = self.segments.iter().flat_map(|s| [s.start, s.len, s.context, s.table]);
        rig.u32s(&words.collect::<Vec<_>>())
    }

    /// Position of every row.
    pub(super) fn positions(&self) -> Vec<u32> {
        self.segments.iter().flat_map(|s| s.context - s.len..s.context).collect()
    }

    /// First entry of every row's table.
    pub(super) fn row_tables(&self) -> Vec<u32> {
        self.segments.iter().flat_map(|s| (0..s.len).map(|_| s.table)).collect()
    }

    /// The cache of one sequence in order of positions.
    pub(super) fn contents(
        &self,
        rig: &Rig,
        cache: &DeviceSlice,
        sequence: usize,
    ) -> Result<Vec<f32>, Failure> {
        let mut all = Vec::new();
        for offset in &self.tables[sequence * self.blocks..(sequence + 1) * self.blocks] {
            let start = *offset as usize;
            all.extend(rig.bf16s(cache, start..start + BLOCK * self.row)?);
        }
        Ok(all)
    }
}

/// Attention of one query over keys and values of as many tokens as there are values, in f64.
pub(super) fn attend<'a>(
    scale: f32,
    query: &[f64],
    keys: impl Iterator<Item = &'a [f32]>,
    values: impl Iterator<Item = &'a [f32]>,
) -> Vec<f64> {
    let scores: Vec<f64> = keys
        .map(|key| query.iter().zip(key).map(|(q, k)| q * f64::from(*k)).sum::<f64>())
        .map(|product| product * f64::from(scale))
        .collect();
    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - top).exp()).collect();
    let mass: f64 = weights.iter().sum();
    let mut out = Vec::new();
    for (weight, value) in weights.iter().zip(values) {
        out.resize(value.len(), 0.0);
        out.iter_mut().zip(value).for_each(|(sum, v)| *sum += weight * f64::from(*v));
    }
    out.iter_mut().for_each(|sum| *sum /= mass);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attention_is_a_weighted_mean() {
        let rows: [[f32; 2]; 2] = [[1.0, 0.0], [0.0, 1.0]];
        let of = |rows: &'static [[f32; 2]]| rows.iter().map(|row| &row[..]);
        let rows: &'static [[f32; 2]] = Box::leak(Box::new(rows));
        let got = attend(1.0, &[3.0_f64.ln(), 0.0], of(rows), of(rows));
        assert!((got[0] - 0.75).abs() < 1e-7 && (got[1] - 0.25).abs() < 1e-7, "{got:?}");
    }

    #[test]
    fn every_block_belongs_to_one_sequence() {
        let step = Step::new(3, 2, 130, 8);
        let mut offsets = step.tables.clone();
        offsets.sort_unstable();
        offsets.dedup();
        assert_eq!(offsets.len(), 9);
        assert_eq!((step.rows(), step.elements()), (6, 9 * 64 * 8));
        assert_eq!(step.positions(), [128, 129, 128, 129, 128, 129]);
        assert_eq!(step.row_tables(), [0, 0, 3, 3, 6, 6]);
    }
}
