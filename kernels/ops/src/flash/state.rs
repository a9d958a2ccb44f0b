//! The running softmax of some query rows.

use crate::exp::{exp_sum, maximum};
use crate::paged::BLOCK;
use crate::tile::{Lines, Stored, dots, sums};
use device::Isa;
use std::ops::Range;

/// Rows whose scores are held at once; small enough to stay in the nearest cache.
const GROUP: usize = 16;

/// Per row the highest score so far, the mass of all weights relative to it, and the weighted sum
/// of values. Views of one slot of scratch.
pub(crate) struct State<'a> {
    highest: &'a mut [f32],
    mass: &'a mut [f32],
    sum: &'a mut [f32],
    width: usize,
}

/// Queries and how they score.
#[derive(Clone, Copy)]
pub(crate) struct Queries<'a> {
    pub(crate) isa: Isa,
    pub(crate) lines: Lines<'a, f32>,
    pub(crate) scale: f32,
}

impl<'a> State<'a> {
    /// Elements of scratch for `rows` rows of `width` values.
    pub(crate) const fn len(rows: usize, width: usize) -> usize {
        rows * (width + 2)
    }

    /// The state in a slot as it is, and what is left of the slot.
    pub(crate) fn of(slot: &'a mut [f32], rows: usize, width: usize) -> (Self, &'a mut [f32]) {
        let (highest, slot) = slot.split_at_mut(rows);
        let (mass, slot) = slot.split_at_mut(rows);
        let (sum, rest) = slot.split_at_mut(rows * width);
        (Self { highest, mass, sum, width }, rest)
    }

    /// Nothing seen yet.
    pub(crate) fn reset(&mut self) {
        self.highest.fill(f32::NEG_INFINITY);
        self.mass.fill(0.0);
        self.sum.fill(0.0);
    }

    /// Takes in up to a block of keys with their values. Row `m` sees the keys `seen(m)`, an empty
    /// range where it sees none; what it does not see is not read for it, whatever it holds.
    pub(crate) fn absorb<K: Stored, V: Stored>(
        &mut self,
        queries: Queries<'_>,
        keys: Lines<'_, K>,
        values: Lines<'_, V>,
        seen: impl Fn(usize) -> Range<usize>,
    ) {
        let rows = self.highest.len();
        for first in (0..rows).step_by(GROUP) {
            let count = (rows - first).min(GROUP);
            let mut ranges: [Range<usize>; GROUP] = std::array::from_fn(|_| 0..0);
            // Keys that some row sees, and keys that all rows see.
            let (mut any, mut all) = (Range { start: BLOCK, end: 0 }, 0..BLOCK);
            for (i, range) in ranges.iter_mut().enumerate().take(count) {
                *range = seen(first + i);
                if range.start < range.end {
                    any = any.start.min(range.start)..any.end.max(range.end);
                }
                all = all.start.max(range.start)..all.end.min(range.end);
            }
            if any.is_empty() {
                continue;
            }
            let mut scores = [0.0_f32; GROUP * BLOCK];
            let Queries { isa, lines, scale } = queries;
            let lines = lines.lines(first..first + count);
            dots(isa, lines, keys.lines(any.clone()), scale, &mut scores[any.start..], BLOCK);
            for (i, range) in ranges.iter().enumerate().take(count) {
                let row = &mut scores[i * BLOCK..(i + 1) * BLOCK];
                self.weigh(isa, first + i, &mut row[range.clone()]);
            }
            let shared = if all.is_empty() { 0..0 } else { all };
            self.add(isa, first, &ranges[..count], &scores, values, shared);
        }
    }

    /// Turns a row's scores into weights relative to its new maximum and shrinks what it has.
    fn weigh(&mut self, isa: Isa, m: usize, scores: &mut [f32]) {
        if scores.is_empty() {
            return;
        }
        let top = self.highest[m].max(maximum(isa, scores));
        // A NaN among the scores does not become the maximum; it poisons the mass.
        if top > self.highest[m] {
            let shrink = (self.highest[m] - top).exp();
            self.highest[m] = top;
            self.mass[m] *= shrink;
            let sum = &mut self.sum[m * self.width..(m + 1) * self.width];
            sum.iter_mut().for_each(|x| *x *= shrink);
        }
        self.mass[m] += exp_sum(isa, scores, top);
    }

    /// Adds weighted values: the keys that all rows see for all rows at once, the rest row by row,
    /// in ascending order for each row.
    fn add<V: Stored>(
        &mut self,
        isa: Isa,
        first: usize,
        ranges: &[Range<usize>],
        weights: &[f32],
        values: Lines<'_, V>,
        shared: Range<usize>,
    ) {
        if shared.is_empty() {
            for (i, range) in ranges.iter().enumerate() {
                self.add_row(isa, first + i, &weights[i * BLOCK..], values, range.clone());
            }
            return;
        }
        for (i, range) in ranges.iter().enumerate() {
            let early = range.start..shared.start;
            self.add_row(isa, first + i, &weights[i * BLOCK..], values, early);
        }
        let (p, sum) = (&weights[shared.start..], &mut self.sum[first * self.width..]);
        sums(isa, ranges.len(), p, BLOCK, values.lines(shared.clone()), sum, self.width);
        for (i, range) in ranges.iter().enumerate() {
            let late = shared.end..range.end;
            self.add_row(isa, first + i, &weights[i * BLOCK..], values, late);
        }
    }

    fn add_row<V: Stored>(
        &mut self,
        isa: Isa,
        m: usize,
        weights: &[f32],
        values: Lines<'_, V>,
        range: Range<usize>,
    ) {
        if !range.is_empty() {
            let sum = &mut self.sum[m * self.width..];
            sums(isa, 1, &weights[range.start..], BLOCK, values.lines(range), sum, self.width);
        }
    }

    /// Takes in the state of the keys that follow: a sum of two softmaxes by their log-sum-exp.
    pub(crate) fn merge(&mut self, later: &State<'_>) {
        for m in 0..self.highest.len() {
            if later.highest[m] == f32::NEG_INFINITY && later.mass[m] == 0.0 {
                continue; // The row saw none of them.
            }
            let top = self.highest[m].max(later.highest[m]);
            let old = (self.highest[m] - top).exp();
            let new = (later.highest[m] - top).exp();
            self.highest[m] = top;
            self.mass[m] = self.mass[m] * old + later.mass[m] * new;
            let range = m * self.width..(m + 1) * self.width;
            for (sum, x) in self.sum[range.clone()].iter_mut().zip(&later.sum[range]) {
                *sum = *sum * old + x * new;
            }
        }
    }

    /// Writes row `m`'s result. Every row has seen at least itself, so its mass is positive or NaN.
    pub(crate) fn finish(&self, m: usize, out: &mut [f32]) {
        let inverse = 1.0 / self.mass[m];
        let sum = &self.sum[m * self.width..(m + 1) * self.width];
        out.iter_mut().zip(sum).for_each(|(y, x)| *y = x * inverse);
    }
}
