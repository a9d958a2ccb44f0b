//! What tests of several ops share: reproducible random data and comparison that sees NaN.

use device::AlignedVec;

/// A small generator; the same seed gives the same data everywhere.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// In (-1, 1), mean 0.
    pub(crate) fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    }

    pub(crate) fn vector(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.unit()).collect()
    }
}

/// Asserts equality within `tolerance`, and NaN exactly where NaN is expected.
pub(crate) fn assert_close(what: &str, got: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        let g = f64::from(*g);
        assert_eq!(g.is_nan(), e.is_nan(), "{what}: element {i} is {g}, expected {e}");
        assert!(
            e.is_nan() || (g - e).abs() <= tolerance * e.abs().max(1.0),
            "{what}: element {i} is {g}, expected {e}"
        );
    }
}

/// A buffer full of NaN, so that an element nobody wrote is seen.
pub(crate) fn poisoned(len: usize) -> AlignedVec<f32> {
    let mut buffer = AlignedVec::zeros(len);
    buffer.fill(f32::NAN);
    buffer
}
