//! Both forms against a plain f64 softmax over fully expanded keys and values.

use super::*;
use crate::WeightSlice;
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

    /// Each segment in the form that suits it.
    fn mixed(&self) -> Vec<f32> {
        let pool = ThreadPool::new(2);
        let shape = &self.shape;
        let rows = shape.heads * (shape.nope + shape.v);
        let kv_b = Matrix::new(WeightSlice::F32(&self.kv_b), rows, shape.latent);
        let tokens = self.q.len() / (shape.heads * (shape.nope + shape.rope));
        let mut out = poisoned(tokens * shape.heads * shape.v);
        let mut scratch = poisoned(scratch_len(&pool, shape, tokens));
        let (layer, arena) = (self.cache.layer, Kv::F32(&self.cache.arena));
        let segments = self.segments();
        attention(&pool, &self.q, kv_b, shape, layer, &segments, arena, &mut out, &mut scratch);
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
                    let position = segment.position(i);
                    let kv = &self.contents[s];
                    expected.extend(reference::row(q, kv, &self.kv_b, &self.shape, position, h));
                }
            }
        }
        assert_eq!(expected.len() % v, 0);
        for isa in Isa::available() {
            for form in [Form::Absorbed, Form::Expanded] {
                let what = format!("{form:?} {isa} {:?}", self.shape);
                let one = self.run(form, isa, 1);
                assert_close(&what, &one, &expected, 5e-5);
                assert_eq!(one, self.run(form, isa, 3), "{what}: threads change nothing");
            }
        }
    }
}

const SMALL: Mla = Mla { heads: 3, nope: 5, rope: 4, v: 7, latent: 19, scale: 0.3 };

#[test]
fn both_forms_agree_with_f64_at_odd_sizes() {
    let ragged = [(1, 1), (1, 64), (1, 65), (3, 3), (7, 130), (63, 63), (64, 64), (65, 129)];
    Setup::new(SMALL, &ragged).check();
    Setup::new(Mla { heads: 1, v: 3, ..SMALL }, &[(2, 63), (1, 128), (129, 129)]).check();
    Setup::new(Mla { heads: 5, rope: 2, ..SMALL }, &[(40, 100), (1, 7)]).check();
    Setup::new(Mla { heads: 7, nope: 1, ..SMALL }, &[(33, 33), (1, 1)]).check();
}

#[test]
fn long_contexts_are_split_and_merged() {
    let shape = Mla { heads: 2, nope: 2, rope: 2, v: 2, latent: 3, scale: 0.5 };
    Setup::new(shape, &[(1, 511), (1, 513), (70, 1100), (1, 6000)]).check();
}

#[test]
fn more_rows_than_a_tile_are_cut() {
    let shape = Mla { heads: 1, nope: 2, rope: 2, v: 1, latent: 2, scale: 0.5 };
    Setup::new(shape, &[(1030, 1100)]).check();
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
fn the_cheaper_form_is_chosen_segment_by_segment() {
    let native = Mla { heads: 16, nope: 128, rope: 64, v: 128, latent: 512, scale: 1.0 };
    assert_eq!(select(&native, 1), Form::Absorbed);
    assert_eq!(select(&native, 170), Form::Absorbed);
    assert_eq!(select(&native, 172), Form::Expanded);
    // Forms alternate in one batch; each row has the bits of its segment's form.
    let at = (1..).find(|rows| select(&SMALL, *rows) == Form::Expanded).expect("a crossover");
    let setup = Setup::new(SMALL, &[(1, 70), (1, 3), (at, 200), (2, 65), (at + 9, 600), (1, 1)]);
    let both = [Form::Absorbed, Form::Expanded].map(|form| setup.run(form, Isa::detect(), 2));
    let mixed = setup.mixed();
    let width = SMALL.heads * SMALL.v;
    for segment in setup.segments() {
        let rows = segment.start * width..(segment.start + segment.len) * width;
        let of_form = &both[usize::from(select(&SMALL, segment.len) == Form::Expanded)];
        assert_eq!(mixed[rows.clone()], of_form[rows]);
    }
}

#[test]
fn nan_in_one_sequence_stays_there() {
    let mut setup = Setup::new(SMALL, &[(1, 70), (3, 70), (2, 70)]);
    let block = usize::try_from(setup.cache.tables[1][0]).expect("small");
    setup.cache.arena[block + setup.cache.layer.offset + 3] = f32::NAN;
    for form in [Form::Absorbed, Form::Expanded] {
        for isa in Isa::available() {
            let out = setup.run(form, isa, 2);
            for (token, row) in out.chunks_exact(SMALL.heads * SMALL.v).enumerate() {
                let in_second = (1..4).contains(&token);
                assert!(row.iter().all(|x| x.is_nan() == in_second), "{form:?} {isa} {token}");
            }
        }
    }
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
