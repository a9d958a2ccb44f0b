//! Router rows that load every expert evenly.
//!
//! For inputs whose direction is uniform, logits of orthonormal rows are independent and equally
//! distributed, so every expert, and every group of experts, is chosen equally often, whatever the
//! scoring, the top-k and the group limit. Plain normal rows would not do: they differ in length and
//! correlate by chance, which at 64 experts over 2048 columns already moves shares by several per
//! cent.
//!
//! It makes one router whole. Invariant: rows have unit length, in fixed order of summation, so
//! the bits do not depend on machine or thread count.

use super::Generator;

/// Lanes of a dot product, summed apart: the order is fixed and the compiler may use vectors.
const LANES: usize = 8;
/// Shorter than this, what is left of a row is rounding error.
const DEGENERATE: f64 = 1e-9;

/// The rows, in double precision, row-major `[experts, hidden]`.
///
/// With more experts than columns no more than `hidden` rows can be orthogonal; each further one is
/// orthogonal to as many as it can be: none. They are normalised only.
pub(super) fn orthonormal_rows(generator: Generator, experts: usize, hidden: usize) -> Vec<f64> {
    let mut rows: Vec<f64> = (0..experts * hidden).map(|i| generator.normal(i as u64)).collect();
    for row in 0..experts {
        let (before, rest) = rows.split_at_mut(row * hidden);
        let current = &mut rest[..hidden];
        // Modified Gram-Schmidt: each projection is taken of what the ones before have left.
        if row < hidden {
            for other in before.chunks_exact(hidden) {
                let along = dot(current, other);
                for (x, y) in current.iter_mut().zip(other) {
                    *x -= along * y;
                }
            }
        }
        let length = dot(current, current).sqrt();
        if length > DEGENERATE {
            current.iter_mut().for_each(|x| *x /= length);
        } else {
            // Only a handful of columns can get here, by drawing zeros.
            current.fill(0.0);
            current[row % hidden] = 1.0;
        }
    }
    rows
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut lanes = [0.0; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f64 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        for lane in 0..LANES {
            lanes[lane] += x[lane] * y[lane];
        }
    }
    lanes.iter().sum::<f64>() + tail
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_orthonormal_at_odd_sizes() {
        for (experts, hidden) in [(1, 1), (3, 3), (5, 7), (64, 64), (60, 257)] {
            let rows = orthonormal_rows(Generator::new(9, "r"), experts, hidden);
            for (i, a) in rows.chunks_exact(hidden).enumerate() {
                for (j, b) in rows.chunks_exact(hidden).enumerate() {
                    let expected = f64::from(u8::from(i == j));
                    assert!((dot(a, b) - expected).abs() < 1e-10, "{experts}x{hidden}: {i} {j}");
                }
            }
        }
    }

    #[test]
    fn more_experts_than_columns_keep_unit_rows() {
        let rows = orthonormal_rows(Generator::new(9, "r"), 9, 4);
        assert!(rows.chunks_exact(4).all(|row| (dot(row, row) - 1.0).abs() < 1e-12));
        assert!(orthonormal_rows(Generator::new(9, "r"), 0, 4).is_empty());
    }

    /// The load that `realistic` promises, through the rounding to bf16 that checkpoints have.
    #[test]
    fn every_expert_gets_its_share_within_three_per_cent() {
        const EXPERTS: usize = 64;
        const HIDDEN: usize = 128;
        const TOP_K: usize = 6;
        const TOKENS: usize = 200_000;
        let rows: Vec<f32> = orthonormal_rows(Generator::new(5, "r"), EXPERTS, HIDDEN)
            .iter()
            .map(|&x| half::bf16::from_f32(x as f32).to_f32())
            .collect();
        // Column-major, so that one token's logits are sums of columns.
        let columns: Vec<f32> =
            (0..HIDDEN * EXPERTS).map(|i| rows[i % EXPERTS * HIDDEN + i / EXPERTS]).collect();
        let inputs = Generator::new(6, "inputs");
        let mut chosen = [0u32; EXPERTS];
        for token in 0..TOKENS {
            let mut logits = [0.0f32; EXPERTS];
            for (d, column) in columns.chunks_exact(EXPERTS).enumerate() {
                let x = inputs.normal((token * HIDDEN + d) as u64) as f32;
                logits.iter_mut().zip(column).for_each(|(logit, w)| *logit += x * w);
            }
            let mut order: [usize; EXPERTS] = std::array::from_fn(|e| e);
            order.select_nth_unstable_by(TOP_K, |&a, &b| logits[b].total_cmp(&logits[a]));
            order[..TOP_K].iter().for_each(|&e| chosen[e] += 1);
        }
        let uniform = (TOKENS * TOP_K) as f64 / EXPERTS as f64;
        for (expert, &count) in chosen.iter().enumerate() {
            let off = f64::from(count) / uniform - 1.0;
            assert!(off.abs() < 0.03, "expert {expert} is {:.2} % off uniform", off * 100.0);
        }
    }
}
