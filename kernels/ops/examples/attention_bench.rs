//! Measures attention and sampling at the shapes they are used at:
//!
//! ```text
//! cargo run --release -p ops --example attention_bench -- [threads]
//! ```
//!
//! Attention reports products per second and bytes of cache read per second, sampling microseconds
//! per row. Medians of several rounds. It checks no result; the tests do.

#![allow(clippy::print_stdout, reason = "the table is what this program is for")]

use device::{Isa, ThreadPool};
use half::bf16;
use ops::gqa::{self, Gqa};
use ops::mla::{self, Form, Mla};
use ops::paged::{BLOCK, Kv, KvLayer, Segment};
use ops::sample::{LogSoftmax, Params, Seen, Workspace, sample};
use ops::{Matrix, WeightSlice};
use std::time::Instant;

/// Rounds of which the median is taken.
const ROUNDS: usize = 7;

/// Median seconds of a call.
fn median(mut call: impl FnMut()) -> f64 {
    call();
    let mut times = [0.0; ROUNDS];
    for time in &mut times {
        let begin = Instant::now();
        call();
        *time = begin.elapsed().as_secs_f64();
    }
    times.sort_by(f64::total_cmp);
    times[ROUNDS / 2]
}

/// Reproducible numbers in (-1, 1).
fn numbers(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// An arena for sequences of one length, and their tables.
fn cache(sequences: usize, context: usize, row: usize) -> (Vec<bf16>, Vec<Vec<u64>>) {
    let blocks = context.div_ceil(BLOCK);
    let values = numbers(1 << 16, 3);
    let arena = values.iter().cycle().take(sequences * blocks * BLOCK * row);
    let table =
        |s: usize| (0..blocks).map(|b| ((b * sequences + s) * BLOCK * row) as u64).collect();
    (arena.map(|x| bf16::from_f32(*x)).collect(), (0..sequences).map(table).collect())
}

fn segments(tables: &[Vec<u64>], len: usize, context: usize) -> Vec<Segment<'_>> {
    let of = |(i, table): (usize, _)| Segment { start: i * len, len, context, table };
    tables.iter().map(Vec::as_slice).enumerate().map(of).collect()
}

/// Pairs of a query row and a key that it sees.
fn pairs(len: usize, context: usize) -> f64 {
    (0..len).map(|i| context - len + i + 1).sum::<usize>() as f64
}

fn main() {
    let threads = std::env::args().nth(1).and_then(|x| x.parse().ok()).unwrap_or(2);
    let pool = ThreadPool::new(threads);
    println!("{threads} threads, {}", Isa::detect());
    // Sequences, rows each, context.
    let batches =
        [(1, 1, 512), (1, 1, 8192), (16, 1, 2048), (1, 64, 1024), (1, 512, 512), (2, 512, 4096)];
    println!("\ngqa, 16 heads, 8 kv heads of 128, bf16 cache");
    let shape = Gqa { heads: 16, kv_heads: 8, head_dim: 128, scale: 0.088, window: None };
    for batch in batches {
        measure_gqa(&pool, &shape, batch);
    }
    for (heads, note) in [(16, "DeepSeek-V2-Lite"), (2, "the bundled model")] {
        println!("\nmla, {heads} heads ({note}), bf16 cache and weights");
        let shape = Mla { heads, nope: 128, rope: 64, v: 128, latent: 512, scale: 0.07 };
        for batch in batches {
            measure_mla(&pool, &shape, batch);
        }
    }
    measure_sampling();
}

fn report(batch: (usize, usize, usize), what: &str, seconds: f64, products: f64, bytes: f64) {
    let (sequences, len, context) = batch;
    println!(
        "{sequences:>3} x {len:>4} rows at {context:>5}  {what:<9} {:>10.1} us {:>8.1} GFLOP/s {:>7.1} GB/s",
        seconds * 1e6,
        2.0 * products / seconds / 1e9,
        bytes / seconds / 1e9
    );
}

fn measure_gqa(pool: &ThreadPool, shape: &Gqa, batch: (usize, usize, usize)) {
    let (sequences, len, context) = batch;
    let row = 2 * shape.kv_heads * shape.head_dim;
    let (arena, tables) = cache(sequences, context, row);
    let segments = segments(&tables, len, context);
    let q = numbers(sequences * len * shape.heads * shape.head_dim, 5);
    let mut out = vec![0.0; q.len()];
    let mut scratch = vec![0.0; gqa::scratch_len(pool, shape)];
    let layer = KvLayer { offset: 0, row };
    let kv = Kv::Bf16(&arena);
    let seconds = median(|| {
        gqa::attention(pool, &q, shape, layer, &segments, kv, &mut out, &mut scratch);
    });
    let per_pair = (2 * shape.heads * shape.head_dim) as f64;
    let products = sequences as f64 * pairs(len, context) * per_pair;
    report(batch, "gqa", seconds, products, (sequences * context * row * 2) as f64);
}

fn measure_mla(pool: &ThreadPool, shape: &Mla, batch: (usize, usize, usize)) {
    let (sequences, len, context) = batch;
    let Mla { heads, nope, rope, v, latent, .. } = *shape;
    let (arena, tables) = cache(sequences, context, latent + rope);
    let segments = segments(&tables, len, context);
    let q = numbers(sequences * len * heads * (nope + rope), 5);
    let weights: Vec<bf16> =
        numbers(heads * (nope + v) * latent, 6).into_iter().map(bf16::from_f32).collect();
    let kv_b = Matrix::new(WeightSlice::Bf16(&weights), heads * (nope + v), latent);
    let mut out = vec![0.0; sequences * len * heads * v];
    let mut scratch = vec![0.0; mla::scratch_len(pool, shape, sequences * len)];
    let layer = KvLayer { offset: 0, row: latent + rope };
    let kv = Kv::Bf16(&arena);
    for form in [Form::Absorbed, Form::Expanded] {
        if form == Form::Expanded && len == 1 {
            continue;
        }
        let seconds = median(|| {
            let (out, scratch) = (&mut out, &mut scratch);
            mla::attention_as(
                form,
                Isa::detect(),
                pool,
                &q,
                kv_b,
                shape,
                layer,
                &segments,
                kv,
                out,
                scratch,
            );
        });
        let (rows, seen) = ((sequences * len) as f64, sequences as f64 * pairs(len, context));
        let heads = heads as f64;
        let products = match form {
            Form::Absorbed => {
                heads * (seen * (2 * latent + rope) as f64 + rows * ((nope + v) * latent) as f64)
            }
            Form::Expanded => {
                let made = (sequences * context * (nope + v) * latent) as f64;
                heads * (seen * (nope + rope + v) as f64 + made)
            }
        };
        let bytes = (sequences * context * (latent + rope) * 2) as f64;
        report(batch, &format!("{form:?}").to_lowercase(), seconds, products, bytes);
    }
}

fn measure_sampling() {
    let vocab = 151_936;
    println!("\nsampling from {vocab} logits, one thread, microseconds per row");
    let seen = Seen::none();
    let plain = Params {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        seed: 1,
        choice: 0,
        position: 0,
        repetition_penalty: 1.0,
        frequency_penalty: 0.0,
        presence_penalty: 0.0,
        seen: &seen,
        bias: &[],
        banned: &[],
    };
    let mut history = Seen::none();
    (0..8192).for_each(|token| history.output(token * 17));
    let cases = [
        ("greedy", Params { temperature: 0.0, ..plain }),
        ("temperature", plain),
        ("top-k 50", Params { top_k: 50, ..plain }),
        ("top-k 1000", Params { top_k: 1000, ..plain }),
        ("top-p 0.9", Params { top_p: 0.9, ..plain }),
        ("top-k 50, top-p 0.9", Params { top_k: 50, top_p: 0.9, ..plain }),
        ("min-p 0.05", Params { min_p: 0.05, ..plain }),
        (
            "greedy, 8,192 penalties",
            Params { temperature: 0.0, presence_penalty: 0.5, seen: &history, ..plain },
        ),
    ];
    let normal: Vec<f32> = {
        let sums: Vec<Vec<f32>> = (0..6).map(|i| numbers(vocab, 11 + i)).collect();
        (0..vocab).map(|i| 2.5 * sums.iter().map(|x| x[i]).sum::<f32>()).collect()
    };
    // As a trained model's rows are: a hundred tokens well ahead of the rest.
    let mut peaked: Vec<f32> = normal.iter().map(|x| 0.6 * x).collect();
    (0..100).for_each(|i| peaked[i * 1511] = 16.0 - 0.1 * i as f32);
    let flat: Vec<f32> = numbers(vocab, 9).iter().map(|x| x * 0.1).collect();
    println!("{:<26} {:>10} {:>10} {:>10}", "", "peaked", "normal", "flat");
    let mut workspace = Workspace::new(vocab);
    for (name, params) in cases {
        let mut times = [0.0; 3];
        for (time, row) in times.iter_mut().zip([&peaked, &normal, &flat]) {
            let mut logits = row.clone();
            *time = median(|| {
                let token = sample(&mut logits, &params, &mut workspace);
                assert!(token.is_ok(), "{token:?}");
            });
        }
        let [peaked, normal, flat] = times.map(|time| time * 1e6);
        println!("{name:<26} {peaked:>10.1} {normal:>10.1} {flat:>10.1}");
    }
    let mut top = Vec::with_capacity(21);
    let time = median(|| {
        let softmax = LogSoftmax::of(&normal);
        softmax.top(&normal, 20, &mut top);
        std::hint::black_box((softmax.token(&normal, 77), &top));
    });
    println!("{:<26} {:>10.1}", "20 log-probabilities", time * 1e6);
}
