//! Vector primitives that several ops share: dot products and scaled sums over f32 and bf16.
//!
//! One source per primitive, compiled for each instruction set: the loop runs over fixed groups of
//! lanes, which the compiler maps to the registers the set has. Sums keep one partial sum per lane
//! and fold them in a fixed order, so a result depends on the instruction set, not on the caller.

use device::Isa;
use half::bf16;

/// Partial sums of a dot product.
const LANES: usize = 32;

/// Elements that a vector loop can widen to f32.
pub(crate) trait Element: Copy {
    /// As f32.
    fn widen(self) -> f32;
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

impl Element for half::f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

#[inline(always)]
pub(crate) fn fused<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

#[inline(always)]
fn dot_body<const FMA: bool, T: Element>(x: &[f32], w: &[T]) -> f32 {
    let mut sums = [0.0_f32; LANES];
    let (xs, x_rest) = x.as_chunks::<LANES>();
    let (ws, w_rest) = w.as_chunks::<LANES>();
    for (x, w) in xs.iter().zip(ws) {
        for lane in 0..LANES {
            sums[lane] = fused::<FMA>(x[lane], w[lane].widen(), sums[lane]);
        }
    }
    for (lane, (x, w)) in x_rest.iter().zip(w_rest).enumerate() {
        sums[lane] = fused::<FMA>(*x, w.widen(), sums[lane]);
    }
    fold(sums)
}

/// Adds lanes pairwise: 32, 16, 8, 4, 2, 1.
#[inline(always)]
fn fold(mut sums: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    sums[0]
}

#[inline(always)]
fn axpy_body<const FMA: bool, T: Element>(scale: f32, x: &[T], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = fused::<FMA>(scale, x.widen(), *y);
    }
}

macro_rules! for_each_isa {
    ($(#[$doc:meta])* $name:ident, $body:ident, $avx2:ident, $avx512:ident,
     ($($arg:ident: $ty:ty),*) $(-> $ret:ty)?) => {
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        fn $avx2<T: Element>($($arg: $ty),*) $(-> $ret)? {
            $body::<true, T>($($arg),*)
        }

        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
        fn $avx512<T: Element>($($arg: $ty),*) $(-> $ret)? {
            $body::<true, T>($($arg),*)
        }

        $(#[$doc])*
        #[inline]
        pub(crate) fn $name<T: Element>(isa: Isa, $($arg: $ty),*) $(-> $ret)? {
            match isa {
                Isa::Scalar => $body::<false, T>($($arg),*),
                #[cfg(target_arch = "x86_64")]
                // SAFETY: an `Isa` above scalar comes from detection on this processor.
                Isa::Avx2 => unsafe { $avx2::<T>($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                Isa::Avx512 => unsafe { $avx512::<T>($($arg),*) },
                #[cfg(not(target_arch = "x86_64"))]
                Isa::Avx2 | Isa::Avx512 => $body::<false, T>($($arg),*),
            }
        }
    };
}

for_each_isa! {
    /// Sum of products over the shorter length.
    dot, dot_body, dot_avx2, dot_avx512, (x: &[f32], w: &[T]) -> f32
}

for_each_isa! {
    /// `y += scale * x`.
    axpy, axpy_body, axpy_avx2, axpy_avx512, (scale: f32, x: &[T], y: &mut [f32])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn every_instruction_set_agrees_with_f64() {
        let mut random = Random::new(1);
        for len in [0, 1, 3, 15, 16, 17, 31, 32, 33, 64, 100, 577] {
            let x = random.vector(len);
            let w: Vec<bf16> = random.vector(len).into_iter().map(bf16::from_f32).collect();
            let exact: f64 =
                x.iter().zip(&w).map(|(x, w)| f64::from(*x) * f64::from(w.to_f32())).sum();
            for isa in Isa::available() {
                let got = f64::from(dot(isa, &x, &w));
                assert!((got - exact).abs() < 1e-4, "{isa} {len}: {got} {exact}");
                let mut y = vec![1.0; len];
                axpy(isa, 0.5, &w, &mut y);
                for (y, w) in y.iter().zip(&w) {
                    assert!((y - (1.0 + 0.5 * w.to_f32())).abs() < 1e-6);
                }
            }
        }
    }
}
