//! `exp` and the maximum of many numbers at once, for softmax and sampling.
//!
//! Arguments are differences from a maximum, so results lie in [0, 1]; larger arguments are not
//! served. Invariant: no fused multiply-add, so every instruction set gives the same bits, and a
//! sample does not depend on the processor that drew it. Error below 2 ulp; NaN stays NaN.

use device::Isa;

/// Below this the result is zero: it would not be a normal number.
const LOWEST: f32 = -87.0;
/// Adding it leaves the nearest integer in the low bits of a float.
const ROUND: f32 = 12_582_912.0;
/// ln 2 in two parts; products of the first with small integers are exact (Cody and Waite, 1980).
const LN2: [f32; 2] = [355.0 / 512.0, -2.121_944_4e-4];
/// Minimax coefficients of `(exp(r) - 1 - r) / r^2` for `|r| <= ln 2 / 2`, highest first.
const POLYNOMIAL: [f32; 6] =
    [1.987_569_1e-4, 1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5];

/// `exp(x)` for `x <= 0`.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN2[0] - n * LN2[1];
    let p = POLYNOMIAL[1..].iter().fold(POLYNOMIAL[0], |p, c| p * r + c);
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0_f32.to_bits()));
    let y = (p * r * r + r + 1.0) * power;
    if x < LOWEST { 0.0 } else { y }
}

/// Partial sums of [`exp_sum`].
const LANES: usize = 16;

#[inline(always)]
fn exp_sum_body(x: &mut [f32], top: f32) -> f32 {
    let mut sums = [0.0_f32; LANES];
    let (chunks, rest) = x.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            chunk[lane] = exp(chunk[lane] - top);
            sums[lane] += chunk[lane];
        }
    }
    for (x, sum) in rest.iter_mut().zip(&mut sums) {
        *x = exp(*x - top);
        *sum += *x;
    }
    sums.iter().sum()
}

#[inline(always)]
fn maximum_body(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut tops = [f32::NEG_INFINITY; LANES];
    let mut bad = [false; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            tops[lane] = larger(tops[lane], chunk[lane]);
            bad[lane] |= chunk[lane].is_nan();
        }
    }
    if bad.contains(&true) || rest.iter().any(|x| x.is_nan()) {
        return f32::NAN;
    }
    rest.iter().chain(&tops).copied().fold(f32::NEG_INFINITY, larger)
}

#[inline(always)]
fn weights_body(x: &[f32], top: f32, scale: f32, y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = exp((x - top) * scale);
    }
}

macro_rules! for_each_isa {
    ($(#[$doc:meta])* $name:ident, $body:ident, $avx2:ident, $avx512:ident,
     ($($arg:ident: $ty:ty),*) $(-> $ret:ty)?) => {
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2")]
        fn $avx2($($arg: $ty),*) $(-> $ret)? {
            $body($($arg),*)
        }

        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
        fn $avx512($($arg: $ty),*) $(-> $ret)? {
            $body($($arg),*)
        }

        $(#[$doc])*
        #[inline]
        pub(crate) fn $name(isa: Isa, $($arg: $ty),*) $(-> $ret)? {
            match isa {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: an `Isa` above scalar comes from detection on this processor.
                Isa::Avx2 => unsafe { $avx2($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                Isa::Avx512 => unsafe { $avx512($($arg),*) },
                _ => $body($($arg),*),
            }
        }
    };
}

for_each_isa! {
    /// `x = exp(x - top)` for `x <= top`; returns the sum.
    exp_sum, exp_sum_body, exp_sum_avx2, exp_sum_avx512, (x: &mut [f32], top: f32) -> f32
}

for_each_isa! {
    /// The largest number; NaN where any is NaN, and negative infinity of nothing.
    maximum, maximum_body, maximum_avx2, maximum_avx512, (x: &[f32]) -> f32
}

for_each_isa! {
    /// `y = exp((x - top) * scale)` for `x <= top` and positive `scale`.
    weights, weights_body, weights_avx2, weights_avx512,
    (x: &[f32], top: f32, scale: f32, y: &mut [f32])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_f64_on_its_whole_range() {
        let mut worst = 0.0_f64;
        for i in 0..870_000 {
            let x = -(i as f32) * 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - exact).abs() / exact);
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst:e}");
        assert_eq!([exp(0.0), exp(-0.0), exp(f32::NEG_INFINITY), exp(-87.1)], [1.0, 1.0, 0.0, 0.0]);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        for len in [0, 1, 15, 16, 17, 64, 65] {
            let x: Vec<f32> = (0..len).map(|i| -(i as f32) * 0.37).collect();
            let results: Vec<(Vec<f32>, f32, Vec<f32>)> = Isa::available()
                .map(|isa| {
                    let (mut y, mut z) = (x.clone(), vec![0.0; len]);
                    let sum = exp_sum(isa, &mut y, 0.5);
                    weights(isa, &x, 0.5, 0.7, &mut z);
                    (y, sum, z)
                })
                .collect();
            assert!(results.iter().all(|result| *result == results[0]));
            for isa in Isa::available() {
                let top = if len > 0 { 0.0 } else { f32::NEG_INFINITY };
                let mut turned = x.clone();
                turned.rotate_left(len / 2);
                assert_eq!(maximum(isa, &turned), top);
                for at in 0..len {
                    let was = std::mem::replace(&mut turned[at], f32::NAN);
                    assert!(maximum(isa, &turned).is_nan(), "{isa} {at} of {len}");
                    turned[at] = was;
                }
            }
            let sum: f64 = x.iter().map(|x| (f64::from(*x) - 0.5).exp()).sum();
            assert!((f64::from(results[0].1) - sum).abs() < 1e-5);
        }
    }
}
