//! Both products against f64, at odd sizes, and bit for bit against themselves row by row.

use super::*;
use crate::testing::{Random, assert_close};
use half::bf16;

const SHAPES: [(usize, usize, usize); 8] = [
    (1, 1, 1),
    (1, 64, 128),
    (3, 5, 33),
    (4, 4, 16),
    (5, 63, 17),
    (9, 7, 64),
    (16, 64, 48),
    (31, 2, 100),
];

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn products_agree_with_f64_and_do_not_depend_on_company() {
    for (rows, count, width) in SHAPES {
        let mut random = Random::new((rows * count * width) as u64);
        let (a_stride, b_stride) = (width + 3, width + 1);
        let a = random.vector(rows * a_stride);
        let wide = random.vector(count * b_stride);
        let b: Vec<bf16> = wide.iter().map(|x| bf16::from_f32(*x)).collect();
        let a = Lines::new(&a, rows, width, a_stride);
        let b = Lines::new(&b, count, width, b_stride);
        let mut expected = vec![0.0; rows * count];
        for m in 0..rows {
            for n in 0..count {
                let pairs = a.line(m).iter().zip(b.line(n));
                expected[m * count + n] =
                    pairs.map(|(x, y)| f64::from(*x) * f64::from(y.to_f32())).sum::<f64>()
                        * f64::from(0.3_f32);
            }
        }
        for isa in Isa::available() {
            let mut out = vec![f32::NAN; rows * count];
            dots(isa, a, b, 0.3, &mut out, count);
            assert_close(&format!("dots {isa} {rows} {count} {width}"), &out, &expected, 1e-5);
            for m in 0..rows {
                let mut alone = vec![f32::NAN; count];
                dots(isa, a.lines(m..m + 1), b, 0.3, &mut alone, count);
                assert_eq!(bits(&alone), bits(&out[m * count..(m + 1) * count]));
            }
            for (n, together) in out.iter().enumerate().take(count) {
                let mut alone = [f32::NAN; 1];
                dots(isa, a.lines(0..1), b.lines(n..n + 1), 0.3, &mut alone, 1);
                assert_eq!(alone[0].to_bits(), together.to_bits());
            }
        }
    }
}

#[test]
fn sums_agree_with_f64_and_do_not_depend_on_company() {
    for (rows, count, width) in SHAPES {
        let mut random = Random::new((rows + count + width) as u64);
        let (p_stride, b_stride, stride) = (count + 2, width + 1, width + 4);
        let p = random.vector(rows * p_stride);
        let b = random.vector(count * b_stride);
        let start = random.vector(rows * stride);
        let b = Lines::new(&b, count, width, b_stride);
        let mut expected: Vec<f64> = start.iter().map(|x| f64::from(*x)).collect();
        for m in 0..rows {
            for t in 0..count {
                for (c, x) in b.line(t).iter().enumerate() {
                    expected[m * stride + c] += f64::from(p[m * p_stride + t]) * f64::from(*x);
                }
            }
        }
        for isa in Isa::available() {
            let mut out = start.clone();
            sums(isa, rows, &p, p_stride, b, &mut out, stride);
            assert_close(&format!("sums {isa} {rows} {count} {width}"), &out, &expected, 1e-5);
            for m in 0..rows {
                let mut alone = start[m * stride..(m + 1) * stride].to_vec();
                // Two halves one after the other are the same sum, too.
                let half = count / 2;
                let p = &p[m * p_stride..];
                sums(isa, 1, p, p_stride, b.lines(0..half), &mut alone, stride);
                sums(isa, 1, &p[half..], p_stride, b.lines(half..count), &mut alone, stride);
                assert_eq!(bits(&alone), bits(&out[m * stride..(m + 1) * stride]));
            }
        }
    }
}

#[test]
#[should_panic(expected = "3 rows of 4 every 5 in 13")]
fn rows_outside_of_their_memory_are_refused() {
    let _ = Lines::new(&[0.0_f32; 13], 3, 4, 5);
}
