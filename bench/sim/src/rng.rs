//! Random numbers of the world: SplitMix64, because a run must be its seed and nothing else.
//!
//! Not for sampling tokens and not for secrets. Invariant: equal seeds give equal sequences.

/// A sequence of numbers.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The sequence of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    /// A number below `n`, or 0 when `n` is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        self.draw().checked_rem(n).unwrap_or(0)
    }

    /// A number below `n`.
    pub fn below_u32(&mut self, n: u32) -> u32 {
        // The result is below a u32.
        self.below(u64::from(n)) as u32
    }

    /// One of so many places; where there is one, nothing is drawn.
    pub fn below_among(&mut self, n: usize) -> u32 {
        if n < 2 { 0 } else { self.below_u32(u32::try_from(n).unwrap_or(u32::MAX)) }
    }

    /// True once in `n` times; never when `n` is 0.
    pub fn one_in(&mut self, n: u64) -> bool {
        n != 0 && self.below(n) == 0
    }
}

/// A well-mixed function of one number.
#[must_use]
pub fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A number that stands for `before` followed by `next`; chains of it name histories.
#[must_use]
pub fn chain(before: u64, next: u64) -> u64 {
    mix(before.rotate_left(17) ^ mix(next.wrapping_add(0x9E37_79B9_7F4A_7C15)))
}
