//! From weights and a uniform number to an index.

use super::choose::CHUNK;

/// The first index with weight at which the running mass reaches `u` of the whole. The mass of
/// every chunk is summed first, in 64 bits, so the walk reads few weights.
///
/// Some weight must be positive.
pub(super) fn draw(u: f64, weights: &[f32], sums: &mut Vec<f64>) -> usize {
    mass(weights, sums);
    let target = u * sums.iter().sum::<f64>();
    let mut before = 0.0;
    // The whole was summed in this very order, so some chunk reaches the target.
    let chunk = sums.iter().position(|sum| {
        let reached = *sum > 0.0 && before + sum >= target;
        before += if reached { 0.0 } else { *sum };
        reached
    });
    let begin = chunk.unwrap_or(0) * CHUNK;
    let chunk = (begin..).zip(&weights[begin..(begin + CHUNK).min(weights.len())]);
    // Inside the chunk the order differs, and the walk may end just short: then the last is drawn.
    let mut last = begin;
    for (index, weight) in chunk.filter(|(_, weight)| **weight > 0.0) {
        last = index;
        before += f64::from(*weight);
        if before >= target {
            break;
        }
    }
    last
}

/// The sum of every chunk, in eight partial sums each; returns the whole.
pub(super) fn mass(weights: &[f32], sums: &mut Vec<f64>) -> f64 {
    sums.clear();
    sums.extend(weights.chunks(CHUNK).map(|chunk| {
        let mut parts = [0.0_f64; 8];
        let (eights, rest) = chunk.as_chunks::<8>();
        for eight in eights {
            for (part, weight) in parts.iter_mut().zip(eight) {
                *part += f64::from(*weight);
            }
        }
        let rest: f64 = rest.iter().map(|weight| f64::from(*weight)).sum();
        parts.iter().sum::<f64>() + rest
    }));
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_index_is_the_one_whose_stretch_holds_the_number() {
        let mut weights = vec![0.0_f32; 1000];
        for (i, at) in [0, 255, 256, 600, 999].into_iter().enumerate() {
            weights[at] = (i + 1) as f32;
        }
        let mut sums = Vec::new();
        let mut at = |u: f64| draw(u / 15.0, &weights, &mut sums);
        assert_eq!([at(1e-9), at(0.999), at(1.001), at(2.999)], [0, 0, 255, 255]);
        assert_eq!([at(3.001), at(5.999), at(6.001), at(9.999)], [256, 256, 600, 600]);
        assert_eq!([at(10.001), at(14.999_999)], [999, 999]);
    }

    #[test]
    fn weightless_tokens_are_never_drawn() {
        let mut sums = Vec::new();
        for len in [1, 2, 255, 256, 257, 700] {
            for only in [0, len / 2, len - 1] {
                let mut weights = vec![0.0_f32; len];
                weights[only] = 1e-30;
                for u in [f64::MIN_POSITIVE, 0.5, 1.0 - f64::EPSILON / 2.0] {
                    assert_eq!(draw(u, &weights, &mut sums), only);
                }
            }
        }
    }
}
