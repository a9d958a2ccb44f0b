//! The weighted sum of the chosen experts: `sum_j weight_j * down_j(silu(gate_j x) * up_j x)`.
//!
//! Pairs of (token, choice) are sorted by expert, so each expert's weights are read once a step
//! whatever the batch. The sum of a token runs in the order of its choices, so it does not depend
//! on the other tokens. Experts that live elsewhere add nothing.

use super::Routing;
use crate::Matrix;
use crate::act::silu_mul;
use crate::linear::{PANEL, ROWS_PER_ITEM, Tile, select};
use crate::share::{PerThread, Shared};
use device::{AlignedVec, Isa, ThreadPool};

/// The experts held here, `first` being the number of the first.
#[derive(Clone, Copy, Debug)]
pub struct ExpertWeights<'a> {
    /// Number of the first.
    pub first: usize,
    /// `[intermediate, hidden]` each.
    pub gate: &'a [Matrix<'a>],
    /// `[intermediate, hidden]` each.
    pub up: &'a [Matrix<'a>],
    /// `[hidden, intermediate]` each.
    pub down: &'a [Matrix<'a>],
}

/// Memory for one step, made once.
#[derive(Debug)]
pub struct Scratch {
    /// Sorted pairs: index into the routing.
    pairs: Vec<u32>,
    /// Where each pair went; `u32::MAX` for experts held elsewhere.
    places: Vec<u32>,
    /// First sorted pair of each expert held here, and the end.
    starts: Vec<u32>,
    /// Experts with at least one pair.
    touched: Vec<u32>,
    x: AlignedVec<f32>,
    gate_up: AlignedVec<f32>,
    inner: AlignedVec<f32>,
    y: AlignedVec<f32>,
    panels: AlignedVec<f32>,
}

impl Scratch {
    /// For steps of up to `tokens` tokens with `top_k` of `experts` experts.
    #[must_use]
    pub fn new(
        pool: &ThreadPool,
        tokens: usize,
        top_k: usize,
        experts: usize,
        hidden: usize,
        intermediate: usize,
    ) -> Self {
        let pairs = tokens * top_k;
        Self {
            pairs: Vec::with_capacity(pairs),
            places: Vec::with_capacity(pairs),
            starts: Vec::with_capacity(experts + 1),
            touched: Vec::with_capacity(experts),
            x: AlignedVec::zeros(pairs * hidden),
            gate_up: AlignedVec::zeros(pairs * 2 * intermediate),
            inner: AlignedVec::zeros(pairs * intermediate),
            y: AlignedVec::zeros(pairs * hidden),
            panels: AlignedVec::zeros(PANEL * hidden.max(intermediate) * pool.threads()),
        }
    }

    /// Bytes of such scratch, for the memory plan.
    #[must_use]
    pub const fn bytes(tokens: usize, top_k: usize, hidden: usize, intermediate: usize) -> usize {
        4 * tokens * top_k * (2 * hidden + 3 * intermediate + 2)
    }

    /// Counting sort of the pairs by expert.
    fn sort(&mut self, routing: &Routing<'_>, first: usize, held: usize) {
        self.starts.clear();
        self.starts.resize(held + 1, 0);
        let local = |expert: u32| (expert as usize).checked_sub(first).filter(|e| *e < held);
        for expert in routing.experts.iter().filter_map(|e| local(*e)) {
            self.starts[expert + 1] += 1;
        }
        self.touched.clear();
        for expert in 0..held {
            if self.starts[expert + 1] > 0 {
                self.touched.push(expert as u32);
            }
            self.starts[expert + 1] += self.starts[expert];
        }
        self.pairs.clear();
        self.pairs.resize(self.starts[held] as usize, 0);
        self.places.clear();
        // `starts` is moved up while pairs are placed and comes back to the ends, then shifts.
        for (pair, expert) in (0_u32..).zip(routing.experts) {
            let place = match local(*expert) {
                Some(expert) => {
                    let place = self.starts[expert];
                    self.starts[expert] += 1;
                    self.pairs[place as usize] = pair;
                    place
                }
                None => u32::MAX,
            };
            self.places.push(place);
        }
        self.starts.rotate_right(1);
        self.starts[0] = 0;
    }
}

/// `out` and `x` are `[tokens, hidden]`.
///
/// # Panics
/// When shapes do not fit or `scratch` was made for fewer tokens.
pub fn experts(
    pool: &ThreadPool,
    x: &[f32],
    routing: &Routing<'_>,
    weights: &ExpertWeights<'_>,
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    experts_on(Isa::detect(), pool, x, routing, weights, out, scratch);
}

pub(super) fn experts_on(
    isa: Isa,
    pool: &ThreadPool,
    x: &[f32],
    routing: &Routing<'_>,
    weights: &ExpertWeights<'_>,
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    let k = routing.top_k;
    let tokens = routing.experts.len() / k;
    let hidden = x.len().checked_div(tokens).unwrap_or(0);
    assert!(x.len() == out.len() && x.len() == tokens * hidden, "as many rows out as in");
    if tokens == 0 {
        return;
    }
    scratch.sort(routing, weights.first, weights.gate.len());
    let pairs = scratch.pairs.len();
    let inner = weights.gate.first().map_or(0, |gate| gate.rows);

    let gathered = Shared::new(&mut scratch.x[..pairs * hidden]);
    pool.run(pairs, &|place| {
        let token = scratch.pairs[place] as usize / k;
        // SAFETY: one row per item.
        let row = unsafe { gathered.part(place * hidden, hidden) };
        row.copy_from_slice(&x[token * hidden..(token + 1) * hidden]);
    });

    let gate_up = Group { isa, starts: &scratch.starts, touched: &scratch.touched };
    let wide = &mut scratch.gate_up[..pairs * 2 * inner];
    let both = [weights.gate, weights.up];
    gate_up.run(pool, &scratch.x, &both, wide, &mut scratch.panels);
    if inner > 0 && pairs > 0 {
        silu_mul(
            pool,
            &scratch.gate_up[..pairs * 2 * inner],
            inner,
            &mut scratch.inner[..pairs * inner],
        );
    }
    let y = &mut scratch.y[..pairs * hidden];
    gate_up.run(pool, &scratch.inner, &[weights.down], y, &mut scratch.panels);

    let out = Shared::new(out);
    pool.run(tokens, &|token| {
        // SAFETY: one row per item.
        let sum = unsafe { out.part(token * hidden, hidden) };
        sum.fill(0.0);
        for pair in token * k..(token + 1) * k {
            let place = scratch.places[pair];
            if place != u32::MAX {
                let y = &scratch.y[place as usize * hidden..][..hidden];
                crate::simd::axpy(isa, routing.weights[pair], y, sum);
            }
        }
    });
}

/// Products of each touched expert's rows with its own matrices.
struct Group<'a> {
    isa: Isa,
    starts: &'a [u32],
    touched: &'a [u32],
}

impl Group<'_> {
    /// `out` is `[pairs, sum of rows]`: each set of matrices gives its columns side by side.
    fn run(
        &self,
        pool: &ThreadPool,
        x: &[f32],
        sets: &[&[Matrix<'_>]],
        out: &mut [f32],
        panels: &mut [f32],
    ) {
        let Some(one) = sets.first().and_then(|set| set.first()) else { return };
        let (rows, cols) = (one.rows, one.cols);
        let width = rows * sets.len();
        let blocks = rows.div_ceil(ROWS_PER_ITEM);
        let out = Shared::new(out);
        let panels = PerThread::new(panels, PANEL * cols);
        pool.run(self.touched.len() * sets.len() * blocks, &|item| {
            let (expert, rest) = (item / (sets.len() * blocks), item % (sets.len() * blocks));
            let (set, block) = (rest / blocks, rest % blocks);
            let expert = self.touched[expert] as usize;
            let (start, end) = (self.starts[expert] as usize, self.starts[expert + 1] as usize);
            let range = block * ROWS_PER_ITEM..((block + 1) * ROWS_PER_ITEM).min(rows);
            let tile = Tile {
                x: &x[start * cols..end * cols],
                tokens: end - start,
                w: sets[set][expert].rows(range.clone()),
                bias: None,
                at: start * width + set * rows + range.start,
                width,
            };
            tile.run(self.isa, select(self.isa, end - start), &out, &panels);
        });
    }
}
