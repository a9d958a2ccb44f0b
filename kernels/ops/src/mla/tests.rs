//! Both forms against a plain f64 softmax over fully expanded keys and values.

use super::*;
use crate::paged::testing::Cache;
use crate::testing::{Random, assert_close, poisoned};
use half::bf16;

struct Setup {
    shape: Mla,
    sequences: Vec<(usize, usize)>,
    cache: Cache,
    contents: Vec<Vec<f32>>,
    q: Vec<f32>,
    kv_b: Vec<f32>,
}

impl Setup {
    fn new(shape: Mla, sequences: &[(usize, usize)]) -> Self {
        let lengths: Vec<usize> = sequences.iter().map(|s| s.1).collect();
        let (cache, contents) = Cache::random(&lengths, shape.latent + shape.rope, 11);
        let mut random = Random::new(12);
        let tokens: usize = sequences.iter().map(|s| s.0).sum();
        let q = random.vector(tokens * shape.heads * (shape.nope + shape.rope));
        let kv_b = random.vector(shape.heads * (shape.nope + shape.v) * shape.latent);
        Self { shape, sequences: sequences.to_vec(), cache, contents, q, kv_b }
    }

    fn segments(&self) -> Vec<Segment<'_>> {
        let mut start = 0;
        let mut segments = Vec::new();
        for ((len, context), table) in self.sequences.iter().zip(&self.cache.tables) {
            segments.push(Segment { start, len: *len, context: *context, table });
            start += len;
        }
        segments
    }

    /// Output of row `position` of sequence `s`, head `h`, in f64.
    fn expected(&self, q: &[f32], s: usize, position: usize, h: usize) -> Vec<f64> {
        let Mla { nope, rope, v, latent, scale, .. } = self.shape;
        let line = |t: usize| &self.contents[s][t * (latent + rope)..][..latent + rope];
        let expand = |t: usize, row: usize| -> f64 {
            let w = &self.kv_b[(h * (nope + v) + row) * latent..][..latent];
            line(t).iter().zip(w).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        let scores: Vec<f64> = (0..=position)
            .map(|t| {
                let head: f64 = (0..nope).map(|n| f64::from(q[n]) * expand(t, n)).sum();
                let turned: f64 = (0..rope)
                    .map(|r| f64::from(q[nope + r]) * f64::from(line(t)[latent + r]))
                    .sum();
                (head + turned) * f64::from(scale)
            })
            .collect();
        let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
        let mass: f64 = weights.iter().sum();
        (0..v)
            .map(|i| {
                weights.iter().enumerate().map(|(t, w)| w * expand(t, nope + i)).sum::<f64>() / mass
            })
            .collect()
    }

    fn run(&self, form: Form, isa: Isa, threads: usize) -> Vec<f32> {
        let pool = ThreadPool::new(threads);
        let shape = &self.shape;
        let rows = shape.heads * (shape.nope + shape.v);
        let kv_b = Matrix::new(WeightSlice::F32(&self.kv_b), rows, shape.latent);
        let tokens = self.q.len() / (shape.heads * (shape.nope + shape.rope));
        let mut out = poisoned(tokens * shape.heads * shape.v);
        let mut scratch = poisoned(scratch_len(&pool, shape, tokens));
        attention_as(
            form,
            isa,
            &pool,
            &self.q,
            kv_b,
            shape,
            self.cache.layer,
            &self.segments(),
            Kv::F32(&self.cache.arena),
            &mut out,
            &mut scratch,
        );
        out.to_vec()
    }

    fn check(&self) {
        let Mla { heads, nope, rope, v, .. } = self.shape;
        let mut expected = Vec::new();
        for (s, segment) in self.segments().iter().enumerate() {
            for i in 0..segment.len {
                for h in 0..heads {
                    let at = ((segment.start + i) * heads + h) * (nope + rope);
                    let q = &self.q[at..at + nope + rope];
                    expected.extend(self.expected(q, s, segment.position(i), h));
                }
            }
        }
        assert_eq!(expected.len() % v, 0);
        for isa in Isa::available() {
            for form in [Form::Absorbed, Form::Expanded] {
                let got = self.run(form, isa, 3);
                assert_close(&format!("{form:?} {isa} {:?}", self.shape), &got, &expected, 5e-5);
            }
        }
    }
}

const SMALL: Mla = Mla { heads: 3, nope: 5, rope: 4, v: 7, latent: 19, scale: 0.3 };

#[test]
fn both_forms_agree_with_f64_at_odd_sizes() {
    Setup::new(SMALL, &[(1, 1), (1, 64), (1, 65), (3, 3), (7, 130), (64, 64), (65, 129)]).check();
    Setup::new(Mla { heads: 1, v: 3, ..SMALL }, &[(2, 63), (1, 128)]).check();
}

#[test]
fn native_head_dimensions_agree_with_f64() {
    let shape = Mla { heads: 2, nope: 128, rope: 64, v: 128, latent: 512, scale: 0.02 };
    Setup::new(shape, &[(1, 66), (3, 5)]).check();
}

#[test]
fn a_chunk_gives_the_bits_that_single_rows_give_in_the_same_form() {
    let setup = Setup::new(SMALL, &[(40, 100)]);
    for form in [Form::Absorbed, Form::Expanded] {
        let whole = setup.run(form, Isa::detect(), 2);
        assert_eq!(whole, setup.run(form, Isa::detect(), 1), "threads change nothing");
        let width = SMALL.heads * (SMALL.nope + SMALL.rope);
        for i in [0, 1, 23, 39] {
            let mut one = Setup::new(SMALL, &[(40, 100)]);
            one.sequences = vec![(1, 61 + i)];
            one.q = setup.q[i * width..(i + 1) * width].to_vec();
            let out = SMALL.heads * SMALL.v;
            assert_eq!(
                one.run(form, Isa::detect(), 2),
                whole[i * out..(i + 1) * out],
                "{form:?} {i}"
            );
        }
    }
}

#[test]
fn the_cheaper_form_is_chosen() {
    let native = Mla { heads: 16, nope: 128, rope: 64, v: 128, latent: 512, scale: 1.0 };
    assert_eq!(select(&native, 1), Form::Absorbed);
    assert_eq!(select(&native, 170), Form::Absorbed);
    assert_eq!(select(&native, 172), Form::Expanded);
}

#[test]
fn a_bf16_cache_is_read_as_what_it_holds() {
    let mut setup = Setup::new(SMALL, &[(3, 70)]);
    setup.contents.iter_mut().flatten().for_each(|x| *x = bf16::from_f32(*x).to_f32());
    let rounded: Vec<bf16> = setup.cache.arena.iter().map(|x| bf16::from_f32(*x)).collect();
    setup.cache.arena.iter_mut().zip(&rounded).for_each(|(y, x)| *y = x.to_f32());
    setup.check();
    let expected = setup.run(Form::Absorbed, Isa::detect(), 1);
    let pool = ThreadPool::new(2);
    let kv_b = Matrix::new(WeightSlice::F32(&setup.kv_b), 36, 19);
    let mut out = poisoned(expected.len());
    let mut scratch = poisoned(scratch_len(&pool, &SMALL, 3));
    let arena = Kv::Bf16(&rounded);
    let layer = setup.cache.layer;
    attention(
        &pool,
        &setup.q,
        kv_b,
        &SMALL,
        layer,
        &setup.segments(),
        arena,
        &mut out,
        &mut scratch,
    );
    assert_eq!(out[..], expected[..]);
}
