//! The counter-based generator: splitmix64's output function (Steele, Lea, Flood: "Fast splittable
//! pseudorandom number generators", 2014) over a Weyl sequence that starts at a key made of seed
//! and name.
//!
//! It holds no position. Invariant: the bits are the numpy twin's.

/// The Weyl sequence's step, 2^64 over the golden ratio.
const GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;
/// Sum of eight 16-bit lanes at their mean of 32767.5 each.
const CENTRE: i32 = 262_140;
/// Two words give eight 16-bit lanes.
const LOW_LANES: u64 = 0x0000_FFFF_0000_FFFF;

/// splitmix64's output function: a bijection in which each input bit moves half of the output.
const fn mix(mut z: u64) -> u64 {
    z ^= z >> 30;
    z = z.wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z ^= z >> 27;
    z = z.wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// FNV-1a, 64 bits.
fn fnv1a64(text: &str) -> u64 {
    text.bytes().fold(0xCBF2_9CE4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
    })
}

/// The values of one tensor, each at its place.
#[derive(Clone, Copy, Debug)]
pub struct Generator {
    key: u64,
}

impl Generator {
    /// The values of the tensor called `name` under `seed`.
    #[must_use]
    pub fn new(seed: u64, name: &str) -> Self {
        Self { key: fnv1a64(name) ^ mix(seed.wrapping_add(GAMMA)) }
    }

    /// Where the tensor's sequence starts; all that a device needs to continue it.
    #[must_use]
    pub const fn key(self) -> u64 {
        self.key
    }

    /// Word `j`.
    fn word(self, j: u64) -> u64 {
        mix(self.key.wrapping_add(j.wrapping_add(1).wrapping_mul(GAMMA)))
    }

    /// Sum of the eight lanes of element `i`, from 0 to 8 * 65535.
    fn lane_sum(self, i: u64) -> i32 {
        // Adding lanes pairwise keeps every partial sum within its 32 bits.
        let pairs = |word: u64| (word & LOW_LANES) + ((word >> 16) & LOW_LANES);
        let sums = pairs(self.word(i.wrapping_mul(2))) + pairs(self.word(i.wrapping_mul(2) + 1));
        (sums as u32 + (sums >> 32) as u32) as i32
    }

    /// Element `i`: a draw of mean 0 and variance 1.
    #[must_use]
    pub fn normal(self, i: u64) -> f64 {
        standardise(self.lane_sum(i))
    }

    /// Elements `start..start + out.len()` of a given mean and standard deviation, in single
    /// precision: the same as [`Generator::normal`] one by one. Integers first and numbers
    /// after, so that the compiler can use vectors for the numbers.
    pub(super) fn normals(self, start: u64, mean: f64, std: f64, out: &mut [f32]) {
        let mut sums = [0i32; 256];
        let mut at = start;
        for out in out.chunks_mut(sums.len()) {
            for sum in &mut sums[..out.len()] {
                *sum = self.lane_sum(at);
                at = at.wrapping_add(1);
            }
            for (x, &sum) in out.iter_mut().zip(&sums) {
                *x = (mean + std * standardise(sum)) as f32;
            }
        }
    }
}

fn standardise(sum: i32) -> f64 {
    // A lane has the variance of a uniform of width 65536 but for one part in 2^32.
    f64::from(sum - CENTRE) / (65536.0 * (8.0f64 / 12.0).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splitmix_and_fnv_are_the_published_ones() {
        // splitmix64 seeded with 1234567, as its reference implementation prints it.
        let published = [6_457_827_717_110_365_317, 3_203_168_211_198_807_973];
        let words = [1u64, 2].map(|n| mix(1_234_567u64.wrapping_add(n.wrapping_mul(GAMMA))));
        assert_eq!(words, published);
        assert_eq!(fnv1a64(""), 0xCBF2_9CE4_8422_2325);
        assert_eq!(fnv1a64("a"), 0xAF63_DC4C_8601_EC8C);
        assert_eq!(fnv1a64("foobar"), 0x8594_4171_F739_67E8);
    }

    #[test]
    fn lanes_are_summed_one_by_one() {
        let generator = Generator::new(3, "x");
        for i in [0, 1, 7, u64::from(u32::MAX), u64::MAX / 2] {
            let lanes = |word: u64| (0..4).map(|n| (word >> (16 * n)) & 0xFFFF).sum::<u64>();
            let sum = lanes(generator.word(2 * i)) + lanes(generator.word(2 * i + 1));
            let expected = (sum as f64 - 8.0 * 32767.5) / (65536.0 * (8.0f64 / 12.0).sqrt());
            assert_eq!(generator.normal(i).to_bits(), expected.to_bits());
        }
    }

    #[test]
    fn moments_are_the_normals() {
        let generator = Generator::new(1, "model.layers.0.mlp.down_proj.weight");
        const N: u64 = 1 << 20;
        let mut sums = [0.0f64; 4];
        for i in 0..N {
            let z = generator.normal(i);
            for (power, sum) in sums.iter_mut().enumerate() {
                *sum += z.powi(power as i32 + 1);
            }
        }
        let [mean, variance, skew, fourth] = sums.map(|sum| sum / N as f64);
        // Four standard errors of a million draws; the fourth moment is 3 - 1.2 / 8.
        assert!(mean.abs() < 0.004 && (variance - 1.0).abs() < 0.006, "{mean} {variance}");
        assert!(skew.abs() < 0.016 && (fourth - 2.85).abs() < 0.04, "{skew} {fourth}");
    }

    #[test]
    fn neighbours_names_and_seeds_are_unrelated() {
        let streams = [
            Generator::new(0, "a.weight"),
            Generator::new(1, "a.weight"),
            Generator::new(0, "b.weight"),
        ];
        const N: u64 = 100_000;
        for (a, b, shift) in [(0, 1, 0), (0, 2, 0), (1, 2, 0), (0, 0, 1), (0, 0, 64)] {
            let dot: f64 =
                (0..N).map(|i| streams[a].normal(i) * streams[b].normal(i + shift)).sum();
            let correlation = dot / N as f64;
            assert!(correlation.abs() < 4.5 / (N as f64).sqrt(), "{a} {b} {shift}: {correlation}");
        }
    }
}
