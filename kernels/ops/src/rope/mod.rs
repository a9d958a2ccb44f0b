//! Rotary position embedding (Su et al., 2021) inside heads, in place.
//!
//! The frequencies come ready (whatever scaling a model uses is in them); angles are products of
//! position and frequency in f32, as the reference implementations have them.

pub mod cuda;

use crate::norm::Heads;
use crate::share::Shared;
use device::ThreadPool;

/// How pairs lie in a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// `(x[i], x[i + width / 2])`: GPT-NeoX, Llama, Qwen.
    Halves,
    /// `(x[2i], x[2i + 1])`: GPT-J, DeepSeek.
    Interleaved,
}

/// Frequencies and layout.
#[derive(Clone, Copy, Debug)]
pub struct Rope<'a> {
    /// One per pair.
    pub inv_freq: &'a [f32],
    /// Multiplies cosine and sine (YaRN's attention factor; 1 otherwise).
    pub factor: f32,
    /// Which elements form a pair.
    pub pairing: Pairing,
}

/// Rotates every head of every row; `positions[t]` is the position of row `t`.
///
/// # Panics
/// When heads leave their rows or their width is not twice the number of frequencies.
pub fn rope(pool: &ThreadPool, x: &mut [f32], heads: &Heads, positions: &[u32], rope: &Rope<'_>) {
    heads.check(x.len());
    assert_eq!(heads.width, 2 * rope.inv_freq.len(), "one frequency per pair");
    assert_eq!(x.len(), positions.len() * heads.row, "one position per row");
    let x = Shared::new(x);
    pool.run(positions.len(), &|token| {
        // SAFETY: one row per item.
        let row = unsafe { x.part(token * heads.row, heads.row) };
        let position = positions[token] as f32;
        for (i, frequency) in rope.inv_freq.iter().enumerate() {
            let (sin, cos) = (position * frequency).sin_cos();
            let (sin, cos) = (sin * rope.factor, cos * rope.factor);
            for h in 0..heads.count {
                let head = &mut row[heads.range(h)];
                let (a, b) = match rope.pairing {
                    Pairing::Halves => (i, i + rope.inv_freq.len()),
                    Pairing::Interleaved => (2 * i, 2 * i + 1),
                };
                let (x, y) = (head[a], head[b]);
                head[a] = x * cos - y * sin;
                head[b] = y * cos + x * sin;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, assert_close};

    fn reference(head: &[f32], position: u32, rope: &Rope<'_>) -> Vec<f64> {
        let half = rope.inv_freq.len();
        let mut out: Vec<f64> = head.iter().map(|x| f64::from(*x)).collect();
        for (i, frequency) in rope.inv_freq.iter().enumerate() {
            let angle = f64::from(position as f32 * frequency);
            let (sin, cos) = angle.sin_cos();
            let factor = f64::from(rope.factor);
            let (a, b) = match rope.pairing {
                Pairing::Halves => (i, half + i),
                Pairing::Interleaved => (2 * i, 2 * i + 1),
            };
            let (x, y) = (out[a], out[b]);
            out[a] = (x * cos - y * sin) * factor;
            out[b] = (y * cos + x * sin) * factor;
        }
        out
    }

    #[test]
    fn heads_turn_by_position_in_both_pairings() {
        let pool = ThreadPool::new(2);
        for (width, count) in [(2, 1), (6, 3), (64, 5), (128, 2)] {
            let inv_freq: Vec<f32> =
                (0..width / 2).map(|i| 1e4_f32.powf(-2.0 * i as f32 / width as f32)).collect();
            let heads =
                Heads { row: count * (width + 3) + 1, count, offset: 1, width, stride: width + 3 };
            let positions = [0, 1, 63, 64, 4095, 100_000];
            let x = Random::new(width as u64).vector(heads.row * positions.len());
            for pairing in [Pairing::Halves, Pairing::Interleaved] {
                let table = Rope { inv_freq: &inv_freq, factor: 1.25, pairing };
                let mut y = x.clone();
                rope(&pool, &mut y, &heads, &positions, &table);
                for (token, position) in positions.into_iter().enumerate() {
                    for h in 0..count {
                        let at = heads.range(h);
                        let at = token * heads.row + at.start..token * heads.row + at.end;
                        let expected = reference(&x[at.clone()], position, &table);
                        assert_close("rope", &y[at], &expected, 2e-6);
                    }
                }
            }
        }
    }

    #[test]
    fn position_zero_only_scales() {
        let heads = Heads { row: 4, count: 1, offset: 0, width: 4, stride: 4 };
        let table = Rope { inv_freq: &[1.0, 0.5], factor: 2.0, pairing: Pairing::Halves };
        let mut x = [1.0, 2.0, 3.0, 4.0];
        rope(&ThreadPool::new(1), &mut x, &heads, &[0], &table);
        assert_eq!(x, [2.0, 4.0, 6.0, 8.0]);
    }
}
