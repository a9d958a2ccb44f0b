//! Times every op on a CUDA device at the shapes of a DeepSeek-V2-Lite decode step:
//!
//! ```text
//! cargo run --release -p ops --example cuda_bench -- [latent] [batch sizes]
//! ```
//!
//! Launches go into a graph and over more distinct data than the second-level cache holds; the figure
//! is the mean of one in the graph. Percentages are of the bytes that must move at 4.3 TB/s, what the
//! device reads at best. It checks no result; the tests do.

#![allow(clippy::print_stdout, reason = "the table is what this program is for")]

use device::cuda::{Arena, Context, CudaError, DeviceMemory, DeviceSlice, Event, Stream};
use half::bf16;
use ops::cuda::{Dtype, Gpu, Queue, Rows, Tensor};
use ops::flash::cuda::Query;
use ops::flash::cuda::{Partials, Segment, max_tiles, splits, tiles};
use ops::linear::cuda::Linear;
use ops::mla::Mla;
use ops::mla::cuda::{Core, block, decode as pieces};
use ops::moe::{Router, Scoring};
use ops::norm::Heads;
use ops::paged::KvLayer;
use ops::rope::Pairing;
use ops::{act, embed, gqa, linear, mla, moe, norm, paged, rope, sample};

/// Bytes per microsecond that the device reads at best.
const CEILING: f64 = 4.3e6;
/// Distinct bytes that launches in a row go over.
const DISTINCT: usize = 512 << 20;
/// Launches in a graph.
const LAUNCHES: usize = 32;
/// Times a graph is timed; the median counts.
const ROUNDS: usize = 5;

const BF16: Dtype = Dtype::Bf16;
const HIDDEN: usize = 2048;
const VOCAB: usize = 102_400;
const MLA: Mla = Mla { heads: 16, nope: 128, rope: 64, v: 128, latent: 512, scale: 0.072 };
const EXPERTS: usize = 64;
const TOP_K: usize = 6;
const INTERMEDIATE: usize = 1408;

type Outcome = Result<(), CudaError>;

struct Bench {
    context: Context,
    gpu: Gpu,
    stream: Stream,
    ends: [Event; 2],
    /// Small random numbers, `DISTINCT` bytes and more.
    numbers: DeviceSlice,
    /// Results, and operands that stay in the cache as activations do.
    work: DeviceSlice,
}

/// A generator good enough for data.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

fn bytes_of<T: Copy, const N: usize>(values: &[T], to: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|value| to(*value)).collect()
}

impl Bench {
    fn new() -> Result<Self, CudaError> {
        let context = Context::open(0)?;
        let gpu = Gpu::new(&context)?;
        let stream = Stream::new(&context)?;
        let ends = [Event::new(&context, true)?, Event::new(&context, true)?];
        let numbers = DeviceMemory::allocate(&context, "numbers", 6 * DISTINCT)?;
        let work = DeviceMemory::allocate(&context, "work", 2 * DISTINCT)?;
        let mut random = Random(9);
        let part: Vec<bf16> = (0..8 << 20)
            .map(|_| bf16::from_f32((random.next() >> 40) as f32 / (1_u64 << 28) as f32 - 0.03))
            .collect();
        let part = bytes_of(&part, |x| x.to_le_bytes());
        for memory in [&numbers, &work] {
            for at in (0..memory.bytes()).step_by(part.len()) {
                let end = (at + part.len()).min(memory.bytes());
                stream.upload(&part, &memory.slice(at..end))?;
            }
        }
        Ok(Self { context, gpu, stream, ends, numbers, work })
    }

    fn send<const N: usize, T: Copy>(
        &self,
        values: &[T],
        to: impl Fn(T) -> [u8; N],
    ) -> Result<DeviceSlice, CudaError> {
        let bytes = bytes_of(values, to);
        let slice = DeviceMemory::allocate(&self.context, "operands", bytes.len())?;
        self.stream.upload(&bytes, &slice)?;
        Ok(slice)
    }

    fn send_u32(&self, values: &[u32]) -> Result<DeviceSlice, CudaError> {
        self.send(values, u32::to_le_bytes)
    }

    /// The `i`th of as many stretches of `bytes` as `DISTINCT` bytes hold.
    fn distinct(&self, i: usize, bytes: usize) -> DeviceSlice {
        let padded = bytes.next_multiple_of(256);
        let at = i % (DISTINCT / padded).max(1) * padded;
        self.numbers.slice(at..at + bytes)
    }

    /// Some of the working memory, by hundredths of it.
    fn work(&self, hundredth: usize, bytes: usize) -> DeviceSlice {
        let at = self.work.bytes() / 100 * hundredth / 256 * 256;
        self.work.slice(at..at + bytes)
    }

    /// One line of the table; `launch` gets the number of the launch.
    fn time(
        &self,
        what: &str,
        bytes: usize,
        launch: impl Fn(Queue<'_>, usize) -> Outcome,
    ) -> Outcome {
        let graph = self.stream.capture(|stream| {
            let on = Queue { gpu: &self.gpu, stream };
            (0..LAUNCHES).try_for_each(|i| launch(on, i))
        })?;
        let mut times = [0.0; ROUNDS];
        graph.launch(&self.stream)?;
        for time in &mut times {
            self.ends[0].record(&self.stream)?;
            graph.launch(&self.stream)?;
            self.ends[1].record(&self.stream)?;
            self.stream.synchronize()?;
            *time = f64::from(self.ends[1].micros_since(&self.ends[0])?) / LAUNCHES as f64;
        }
        times.sort_by(f64::total_cmp);
        let micros = times[ROUNDS / 2];
        let rate = bytes as f64 / micros;
        println!(
            "{what:<44} {micros:>8.2} us {:>7.2} MB {:>6.2} TB/s {:>4.0} %",
            bytes as f64 / 1e6,
            rate / 1e6,
            100.0 * rate / CEILING
        );
        Ok(())
    }
}

fn main() -> Outcome {
    let wanted: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let bench = Bench::new()?;
    println!("{:?}", bench.gpu.facts());
    let only_latent = std::env::args().any(|a| a == "latent");
    for rows in if wanted.is_empty() { vec![1, 4, 16, 64, 256] } else { wanted } {
        println!("-- {rows} rows");
        if !only_latent {
            small(&bench, rows)?;
            products(&bench, rows)?;
            experts(&bench, rows)?;
        }
        for context in [256, 1024, 8192] {
            if rows * context <= 64 * 8192 {
                latent(&bench, rows, context)?;
            }
        }
        if !only_latent {
            grouped(&bench, rows, 4096)?;
            sampler(&bench, rows)?;
        }
    }
    Ok(())
}

/// Norms, rotation, the cache, the activation, the router: their bytes are small, their launches not.
fn small(bench: &Bench, rows: usize) -> Outcome {
    let all = Rows::exactly(rows);
    let row = rows * HIDDEN * 2;
    let weight = bench.work(0, HIDDEN * 4);
    let [a, b, c] = [1, 3, 5].map(|at| bench.work(at, rows * 2 * 10_944 * 2));
    let x = Tensor::new(&a, BF16);
    let zero = bench.send_u32(&vec![0; rows])?;
    let ids: Vec<u32> = (0..rows as u32).map(|i| i * 37 % VOCAB as u32).collect();
    let ids = bench.send_u32(&ids)?;
    let table = Tensor::new(&bench.numbers, BF16);
    let operands = embed::cuda::Embed {
        ids: &ids,
        table,
        table_rows: VOCAB,
        first_row: 0,
        width: HIDDEN,
        out: &c,
    };
    bench.time("embed", 2 * row, |on, _| embed::cuda::embed(on, all, &operands))?;
    bench.time("rms_norm", 2 * row, |on, _| {
        norm::cuda::rms_norm(on, all, HIDDEN, x, &weight, 1e-6, &c)
    })?;
    bench.time("add_rms_norm", 4 * row, |on, _| {
        norm::cuda::add_rms_norm(on, all, HIDDEN, x, &b, &weight, 1e-6, &c)
    })?;
    let heads = Heads { row: 3072, count: 16, offset: 128, width: 64, stride: 192 };
    let table = rope::cuda::Rope { inv_freq: &weight, factor: 1.0, pairing: Pairing::Interleaved };
    bench.time("rope, 16 heads", rows * 16 * 64 * 4, |on, _| {
        rope::cuda::rope(on, all, x, &heads, &zero, &table)
    })?;
    let tables = bench.send(&[0_u64], u64::to_le_bytes)?;
    let arena = Tensor::new(&bench.numbers, BF16);
    let to =
        paged::cuda::Destination { arena, positions: &zero, row_tables: &zero, tables: &tables };
    bench.time("write_kv", rows * 2 * 1152, |on, _| {
        paged::cuda::write_kv(on, all, &a, KvLayer { offset: 0, row: 576 }, &to)
    })?;
    bench.time("silu_mul, 10944", rows * 3 * 10_944 * 2, |on, _| {
        act::cuda::silu_mul(on, all, 10_944, x, &c)
    })?;
    let router = Router {
        experts: EXPERTS,
        top_k: TOP_K,
        scoring: Scoring::Softmax,
        limit: None,
        correction: None,
        norm_topk: false,
        scale: 1.0,
    };
    let routing = moe::cuda::Routing { chosen: &b, weights: &c, top_k: TOP_K };
    bench.time("route", rows * EXPERTS * 4, |on, _| {
        let logits = Tensor::new(&a, Dtype::F32);
        let scores = moe::cuda::Scores { logits, router: &router, correction: None };
        moe::cuda::route(on, all, &scores, &routing)
    })
}

fn products(bench: &Bench, rows: usize) -> Outcome {
    let shapes = [
        ("q", HIDDEN, 3072, BF16),
        ("kv_a", HIDDEN, 576, BF16),
        ("o", HIDDEN, 2048, BF16),
        ("shared gate_up", HIDDEN, 5632, BF16),
        ("shared down", 2816, HIDDEN, BF16),
        ("router", HIDDEN, EXPERTS, Dtype::F32),
        ("dense gate_up", HIDDEN, 21_888, BF16),
        ("head", HIDDEN, VOCAB, Dtype::F32),
    ];
    for (name, inputs, outputs, to) in shapes {
        let bytes = inputs * outputs * 2 + rows * (inputs * 2 + outputs * to.size());
        let x = bench.work(0, rows * inputs * 2);
        let out = bench.work(10, rows * outputs * to.size());
        bench.time(&format!("linear {name}, {inputs} to {outputs}"), bytes, |on, i| {
            let w = bench.distinct(i, inputs * outputs * 2);
            let (x, out) = (Tensor::new(&x, BF16), Tensor::new(&out, to));
            let product = Linear::plain(x, &w, out, inputs, outputs);
            linear::cuda::linear(on, Rows::exactly(rows), &product)
        })?;
    }
    Ok(())
}

fn experts(bench: &Bench, rows: usize) -> Outcome {
    let gate_up = bench.numbers.slice(0..EXPERTS * 2 * INTERMEDIATE * HIDDEN * 2);
    let begin = gate_up.bytes();
    let down = bench.numbers.slice(begin..begin + EXPERTS * INTERMEDIATE * HIDDEN * 2);
    let weights = moe::cuda::ExpertWeights {
        first: 0,
        held: EXPERTS,
        gate_up: Tensor::new(&gate_up, BF16),
        down: &down,
        hidden: HIDDEN,
        intermediate: INTERMEDIATE,
    };
    let mut random = Random(5);
    let mut touched = 0;
    let mut choices = Vec::new();
    for _ in 0..LAUNCHES {
        let mut chosen: Vec<u32> = Vec::new();
        for _ in 0..rows {
            let mut of: Vec<u32> = (0..EXPERTS as u32).collect();
            chosen.extend((0..TOP_K).map(|_| of.swap_remove(random.next() as usize % of.len())));
        }
        choices.push(bench.send_u32(&chosen)?);
        chosen.sort_unstable();
        chosen.dedup();
        touched += chosen.len();
    }
    let (x, out) = (bench.work(0, rows * HIDDEN * 2), bench.work(2, rows * HIDDEN * 2));
    let factors = bench.work(4, rows * TOP_K * 4);
    let mut arena = Arena::new(bench.work(5, bench.work.bytes() / 2));
    let scratch =
        moe::cuda::Scratch::take(&mut arena, BF16, rows, TOP_K, EXPERTS, HIDDEN, INTERMEDIATE)?;
    let mean = touched / LAUNCHES;
    let bytes = touched * 3 * INTERMEDIATE * HIDDEN * 2 / LAUNCHES + rows * HIDDEN * 4;
    bench.time(&format!("experts, {mean} touched"), bytes, |on, i| {
        let routing = moe::cuda::Routing { chosen: &choices[i], weights: &factors, top_k: TOP_K };
        moe::cuda::experts(on, Rows::exactly(rows), &x, &routing, &weights, &out, &scratch)
    })
}

/// Segments of one row each in scattered blocks, on the device.
struct Decode {
    segments: DeviceSlice,
    tiles: DeviceSlice,
    tile_count: DeviceSlice,
    max_tiles: usize,
    tables: DeviceSlice,
}

/// Rows of one token each and their tables, blocks in random order.
fn step(rows: usize, context: usize, block: usize) -> (Vec<Segment>, Vec<u64>) {
    let blocks = context.div_ceil(64);
    let mut free: Vec<u64> = (0..(rows * blocks) as u64).collect();
    let mut random = Random(3);
    let tables = (0..rows * blocks)
        .map(|_| free.swap_remove(random.next() as usize % free.len()) * block as u64)
        .collect();
    let segments = (0..rows as u32)
        .map(|i| Segment { start: i, len: 1, context: context as u32, table: i * blocks as u32 })
        .collect();
    (segments, tables)
}

fn decode(
    bench: &Bench,
    rows: usize,
    context: usize,
    block: usize,
    (group, lines): (usize, usize),
) -> Result<Decode, CudaError> {
    let (segments, tables) = step(rows, context, block);
    let mut list = Vec::new();
    tiles(&segments, group, lines, &mut list);
    let flat: Vec<u32> =
        segments.iter().flat_map(|s| [s.start, s.len, s.context, s.table]).collect();
    let tiles: Vec<u32> = list.iter().flat_map(|t| [t.segment, t.line]).collect();
    let most = max_tiles(rows, rows, group, lines);
    let mut padded = tiles;
    padded.resize(2 * most, 0);
    Ok(Decode {
        segments: bench.send_u32(&flat)?,
        tiles: bench.send_u32(&padded)?,
        tile_count: bench.send_u32(&[list.len() as u32])?,
        max_tiles: most,
        tables: bench.send(&tables, u64::to_le_bytes)?,
    })
}

/// Latent attention of decoding rows in pieces: alone, and with the products around it.
fn latent(bench: &Bench, rows: usize, context: usize) -> Outcome {
    let width = MLA.latent + MLA.rope;
    let layer = KvLayer { offset: 0, row: width };
    let cache = rows * context.next_multiple_of(64) * width * 2;
    if cache > bench.numbers.bytes() {
        return Ok(());
    }
    let (segments, tables) = step(rows, context, 64 * width);
    let blocks = bench.gpu.facts().multiprocessors as usize;
    let mut cut = pieces::Cut::default();
    cut.make(&segments, |at| tables.get(at).copied(), rows, MLA.heads, blocks);
    let (most, slots) = pieces::Cut::most(rows, MLA.heads, blocks);
    let mut words: Vec<u32> = cut.pieces.iter().flat_map(pieces::Piece::words).collect();
    words.resize(most * pieces::Piece::WORDS, 0);
    let words = bench.send_u32(&words)?;
    let slot_words = bench.send_u32(cut.slots.as_flattened())?;
    let tables = bench.send(&tables, u64::to_le_bytes)?;
    let mut arena = Arena::new(bench.work(10, bench.work.bytes() / 2));
    let scratch = mla::cuda::Scratch::take(&mut arena, &MLA, BF16, rows)?;
    let partials = pieces::Partials::take(&mut arena, slots)?;
    let (q, out) = (bench.work(0, rows * 16 * 192 * 2), bench.work(5, rows * 2048 * 2));
    let latents = bench.work(80, rows * 16 * width * 2);
    let sums = bench.work(85, rows * 16 * 512 * 2);
    let (absorbed, kv_b) = (bench.work(70, 16 * 512 * 128 * 2), bench.work(75, 16 * 512 * 256 * 2));
    let weights = mla::cuda::Weights { absorbed: &absorbed, kv_b: &kv_b };
    let all = Rows::exactly(rows);
    let query = |from: usize| Query {
        address: latents.address() + 2 * from as u64,
        row: 16 * width,
        head: width,
    };
    let run = |on: Queue<'_>, i, alone| {
        let kv = bench.distinct(i, cache);
        let map = pieces::cache_map(&kv)?;
        let (slots, tables, map) = (&slot_words, &tables, &map);
        let plan = pieces::Plan { map, pieces: &words, slots, tables, blocks, decodes: rows };
        let kv = Tensor::new(&kv, BF16);
        if alone {
            let queries = [query(0), query(512)];
            pieces::attention(on, all, &MLA, queries, layer, kv, &plan, &partials, &sums)
        } else {
            let core = Core::Pieces(&plan, &partials);
            mla::cuda::attention(on, all, &q, &weights, &MLA, layer, kv, core, &scratch, &out)
        }
    };
    let bytes = rows * context * width * 2;
    bench.time(&format!("mla decode, context {context}"), bytes, |on, i| run(on, i, true))?;
    let bytes = bytes + 2 * 16 * 512 * 128 * 2;
    bench.time(&format!("mla with kv_b, context {context}"), bytes, |on, i| run(on, i, false))?;

    // The three kernels around and of the pieces, over weights of as many layers as launches.
    let half = 16 * 512 * 128 * 2;
    let layers = |i: usize, part: usize, bytes: usize| {
        let at = 2 * DISTINCT + i % LAUNCHES * (48 << 20) + part;
        bench.numbers.slice(at..at + bytes)
    };
    let positions = bench.send_u32(&vec![context as u32 - 1; rows])?;
    let row_tables: Vec<u32> = segments.iter().map(|s| s.table).collect();
    let row_tables = bench.send_u32(&row_tables)?;
    let norm = bench.work(86, 512 * 4);
    let inv_freq = bench.work(87, 32 * 4);
    let (latent, hidden) = (bench.work(88, rows * width * 2), bench.work(89, rows * HIDDEN * 2));
    let (normed, sum) = (bench.work(91, rows * HIDDEN * 2), bench.work(92, rows * HIDDEN * 2));
    let weight = bench.work(93, HIDDEN * 4);
    let plain = |on: Queue<'_>, i, from: &DeviceSlice, to: &DeviceSlice, part, inputs, outputs| {
        let w = layers(i, part, inputs * outputs * 2);
        let (from, to) = (Tensor::new(from, BF16), Tensor::new(to, BF16));
        linear::cuda::linear(on, all, &Linear::plain(from, &w, to, inputs, outputs))
    };
    let part = |on: Queue<'_>, i, which: &[usize]| {
        let kv = bench.distinct(i, cache);
        let map = pieces::cache_map(&kv)?;
        let (slots, tables, map) = (&slot_words, &tables, &map);
        let plan = pieces::Plan { map, pieces: &words, slots, tables, blocks, decodes: rows };
        let (absorbed, kv_b) = (layers(i, 0, half), layers(i, half, 2 * half));
        let to = paged::cuda::Destination {
            arena: Tensor::new(&kv, BF16),
            positions: &positions,
            row_tables: &row_tables,
            tables,
        };
        let block = block::Block {
            q: &q,
            kv: &latent,
            norm: &norm,
            eps: 1e-6,
            rope: rope::cuda::Rope {
                inv_freq: &inv_freq,
                factor: 1.0,
                pairing: Pairing::Interleaved,
            },
            to,
            layer,
            weights: mla::cuda::Weights { absorbed: &absorbed, kv_b: &kv_b },
            plan: &plan,
            partials: &partials,
            scratch: &scratch,
            out: &out,
        };
        which.iter().try_for_each(|which| match which {
            0 => block::prepare(on, all, &MLA, &block),
            1 => block::pieces(on, all, &MLA, &block),
            2 => block::values(on, all, &MLA, &block),
            3 => {
                let x = Tensor::new(&hidden, BF16);
                norm::cuda::add_rms_norm(on, all, HIDDEN, x, &sum, &weight, 1e-6, &normed)?;
                plain(on, i, &normed, &q, 4 * half, HIDDEN, 16 * 192)?;
                plain(on, i, &normed, &latent, 12 * half, HIDDEN, width)
            }
            _ => plain(on, i, &out, &hidden, 14 * half, 16 * 128, HIDDEN),
        })
    };
    let keys = rows * context * width * 2;
    let projections = HIDDEN * (16 * 192 + width + 16 * 128) * 2;
    for (what, bytes, which) in [
        ("mla_prepare", half, &[0][..]),
        ("mla pieces alone", keys, &[1]),
        ("mla_values", half, &[2]),
        ("mla block, three kernels", keys + 2 * half, &[0, 1, 2]),
        ("norm to o projection", keys + 2 * half + projections, &[3, 0, 1, 2, 4]),
    ] {
        bench.time(&format!("{what}, context {context}"), bytes, |on, i| part(on, i, which))?;
    }
    Ok(())
}

/// The shape of Qwen3-8B: 32 heads over 8 KV heads of 128.
fn grouped(bench: &Bench, rows: usize, context: usize) -> Outcome {
    let shape = gqa::Gqa { heads: 32, kv_heads: 8, head_dim: 128, scale: 0.088, window: None };
    let layer = KvLayer { offset: 0, row: 2048 };
    let cache = rows * context * 2048 * 2;
    if cache > bench.numbers.bytes() {
        return Ok(());
    }
    let (variant, lines) = gqa::cuda::select(&shape, layer, BF16, false);
    let step = decode(bench, rows, context, 64 * 2048, (4, lines))?;
    let splits = splits(bench.gpu.facts().multiprocessors as usize, rows, 8, context);
    let mut arena = Arena::new(bench.work(10, bench.work.bytes() / 2));
    let partials = Partials::take(&mut arena, rows * 32 * splits, 128)?;
    let (q, out) = (bench.work(0, rows * 4096 * 2), bench.work(5, rows * 4096 * 2));
    let plan = ops::flash::cuda::Plan {
        segments: &step.segments,
        tiles: &step.tiles,
        tile_count: &step.tile_count,
        max_tiles: step.max_tiles,
        tables: &step.tables,
        splits,
        variant,
    };
    bench.time(&format!("gqa 32/8, context {context}, {splits} splits"), cache, |on, i| {
        let kv = bench.distinct(i, cache);
        let kv = Tensor::new(&kv, BF16);
        let all = Rows::exactly(rows);
        gqa::cuda::attention(on, all, &q, &shape, layer, kv, &plan, &partials, &out)
    })
}

fn sampler(bench: &Bench, rows: usize) -> Outcome {
    let mut random = Random(11);
    let row: Vec<f32> = (0..VOCAB)
        .map(|_| {
            let mut sum = 0.0;
            (0..6).for_each(|_| sum += (random.next() >> 40) as f32 / (1_u64 << 24) as f32);
            (sum - 3.0) * 3.0
        })
        .collect();
    let all: Vec<f32> = row.iter().copied().cycle().take(rows * VOCAB).collect();
    let logits = bench.send(&all, f32::to_le_bytes)?;
    let [tokens, faults, wanted] = [0, 1, 2].map(|at| bench.work(at, rows * 4));
    bench.stream.fill(&tokens, 0)?;
    bench.stream.upload(&bytes_of(&vec![20_u32; rows], u32::to_le_bytes), &wanted)?;
    let out = bench.work(3, rows * 21 * 12);
    let entries = Rows::exactly(rows);
    for (name, temperature, top_k, top_p) in [
        ("greedy", 0.0_f32, 0_u32, 1.0_f32),
        ("temperature", 1.0, 0, 1.0),
        ("top-k 50", 1.0, 50, 1.0),
        ("top-p 0.9", 1.0, 0, 0.9),
        ("top-k 50, top-p 0.9", 1.0, 50, 0.9),
    ] {
        // Seed, floats as bits, then integers: as `SampleRow` lies in memory.
        let one: Vec<u32> = (0..rows as u32)
            .flat_map(|i| {
                let floats = [temperature, top_p, 0.0, 1.0, 0.0, 0.0].map(f32::to_bits);
                let mut words = vec![i, 7];
                words.extend(floats);
                words.extend([top_k, 0, i, 0, 0, 0, 0, 0]);
                words
            })
            .collect();
        let how = bench.send_u32(&one)?;
        let operands = sample::cuda::Sample {
            logits: &logits,
            vocab: VOCAB,
            how: &how,
            seen: None,
            bias: None,
            banned: None,
            tokens: &tokens,
            faults: &faults,
        };
        bench.time(&format!("sample {name}"), rows * VOCAB * 4, |on, _| {
            sample::cuda::sample(on, entries, &operands)
        })?;
    }
    let operands = sample::cuda::Logprobs {
        logits: &logits,
        vocab: VOCAB,
        chosen: &tokens,
        wanted: &wanted,
        most: 20,
        out: &out,
    };
    bench.time("20 log-probabilities", rows * VOCAB * 4, |on, _| {
        sample::cuda::logprobs(on, entries, &operands)
    })
}
