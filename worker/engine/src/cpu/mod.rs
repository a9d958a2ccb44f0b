//! The CPU executor: walks the resolved op list over preallocated memory.
//!
//! No op allocates and none is chosen here. Invariant: after `configure` a forward touches only
//! memory that exists.

mod arena;
mod launch;

use crate::batch::Batch;
use crate::executor::{Executor, TableView};
use crate::{EngineError, KvDtype, MlaForm, Options, WeightSource};
use arena::Arena;
use device::{Isa, ThreadPool};
use half::bf16;
use ids::Bytes;
use launch::{Launch, Layer, Place, Resolver, Rotation};
use model::lower::Lowered;
use ops::mla::Form;
use ops::moe;
use ops::paged::{Kv, KvMut, Segment};
use ops::rope::Rope;

/// Parts of one merged projection, at most.
const MAX_PARTS: usize = 4;
/// Rows of logits computed at once, at most.
const MAX_TILE: usize = 64;
/// Elements of logits held at once, at most (but for one row).
const MAX_TILE_ELEMENTS: usize = 1 << 23;

/// Runs one rank's program on the processor's threads.
pub(crate) struct Cpu<'w> {
    pool: ThreadPool,
    body: Vec<Launch<'w>>,
    head: Vec<Launch<'w>>,
    rotations: Vec<Rotation>,
    hidden: Place,
    chosen: Place,
    logits: Place,
    body_width: usize,
    head_width: usize,
    tile: usize,
    mla_form: MlaForm,
    memory: Memory,
}

/// Everything that a step writes.
struct Memory {
    arena: Arena,
    head_arena: Arena,
    scratch: Vec<f32>,
    moe: Option<moe::Scratch>,
    routing: Routing,
    kv: KvMemory,
    /// Rows of the last forward.
    rows: usize,
    /// Kept empty between steps; see [`recycle`].
    segments: Vec<Segment<'static>>,
}

/// The experts chosen by the latest router.
#[derive(Default)]
struct Routing {
    top_k: usize,
    experts: Vec<u32>,
    weights: Vec<f32>,
}

/// The cache.
enum KvMemory {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

impl KvMemory {
    fn read(&self) -> Kv<'_> {
        match self {
            Self::F32(arena) => Kv::F32(arena),
            Self::Bf16(arena) => Kv::Bf16(arena),
        }
    }

    fn write(&mut self) -> KvMut<'_> {
        match self {
            Self::F32(arena) => KvMut::F32(arena),
            Self::Bf16(arena) => KvMut::Bf16(arena),
        }
    }
}

/// An empty vector's memory for elements of another lifetime: the same layout, so that collecting
/// nothing reuses it.
fn recycle<'b>(mut segments: Vec<Segment<'_>>) -> Vec<Segment<'b>> {
    segments.clear();
    segments.into_iter().map(|segment| Segment { table: &[], ..segment }).collect()
}

impl<'w> Cpu<'w> {
    /// Resolves a program for one rank.
    pub(crate) fn new(
        lowered: Lowered,
        source: &'w dyn WeightSource,
        options: &Options,
    ) -> Result<Self, EngineError> {
        let resolver = Resolver { lowered: &lowered, source };
        let logits = resolver.place(lowered.logits);
        Ok(Self {
            pool: ThreadPool::new(options.threads),
            body: resolver.launches(&lowered.body)?,
            head: resolver.launches(&lowered.head)?,
            rotations: resolver.rotations(),
            hidden: resolver.place(lowered.hidden),
            chosen: resolver.place(lowered.chosen),
            tile: (MAX_TILE_ELEMENTS / logits.width.max(1)).clamp(1, MAX_TILE),
            logits,
            body_width: lowered.body_width,
            head_width: lowered.head_width,
            mla_form: options.mla_form,
            memory: Memory {
                arena: Arena::default(),
                head_arena: Arena::default(),
                scratch: Vec::new(),
                moe: None,
                routing: Routing::default(),
                kv: match options.kv_dtype {
                    KvDtype::F32 => KvMemory::F32(Vec::new()),
                    KvDtype::Bf16 => KvMemory::Bf16(Vec::new()),
                },
                rows: 0,
                segments: Vec::new(),
            },
        })
    }

    /// Allocates activations for `tokens` rows, scratch, and the cache.
    pub(crate) fn configure(&mut self, tokens: usize, cache_bytes: u64) -> Result<(), EngineError> {
        let too_much = |what, elements: u128| EngineError::Memory {
            what,
            bytes: Bytes(u64::try_from(elements * 4).unwrap_or(u64::MAX)),
        };
        let body = self.body_width as u128 * tokens as u128;
        let body = usize::try_from(body).map_err(|_| too_much("activations", body))?;
        let cache = usize::try_from(cache_bytes)
            .map_err(|_| EngineError::Memory { what: "the cache", bytes: Bytes(cache_bytes) })?;
        let memory = &mut self.memory;
        memory.arena.allocate(body);
        memory.head_arena.allocate(self.head_width * self.tile);
        memory.kv = match memory.kv {
            // Zeroed pages come from the system when first touched, so this is quick and lazy.
            KvMemory::F32(_) => KvMemory::F32(vec![0.0; cache / 4]),
            KvMemory::Bf16(_) => KvMemory::Bf16(vec![bf16::ZERO; cache / 2]),
        };
        let launches = self.body.iter().chain(&self.head);
        let scratch = launches.map(|launch| scratch_len(&self.pool, launch, tokens)).max();
        memory.scratch = vec![0.0; scratch.unwrap_or(0)];
        // The expert layers of a model have one shape.
        memory.moe = self.body.iter().find_map(|launch| match launch {
            Launch::Experts { experts, .. } => Some(experts.scratch(&self.pool, tokens)),
            _ => None,
        });
        let choices = self.body.iter().map(|launch| match launch {
            Launch::Route { router, .. } => router.top_k,
            _ => 0,
        });
        let choices = choices.max().unwrap_or(0) * tokens;
        memory.routing =
            Routing { top_k: 0, experts: vec![0; choices], weights: vec![0.0; choices] };
        Ok(())
    }
}

/// Elements of scratch that an op needs for `tokens` rows.
fn scratch_len(pool: &ThreadPool, launch: &Launch<'_>, tokens: usize) -> usize {
    match launch {
        Launch::Linear { x, .. } => ops::linear::scratch_len(pool, x.width),
        Launch::Mla { shape, .. } => ops::mla::scratch_len(pool, shape, tokens),
        _ => 0,
    }
}

impl Executor for Cpu<'_> {
    fn forward(&mut self, batch: &Batch, tables: &TableView<'_>) {
        let Self { pool, body, rotations, memory, mla_form, .. } = self;
        let step = Step { pool, rotations, form: *mla_form, ids: &batch.ids };
        let rows = batch.ids.len();
        memory.rows = rows;
        let mut segments = recycle(core::mem::take(&mut memory.segments));
        let mut group = usize::MAX;
        for launch in body.iter() {
            if let Some(layer) = launch.layer()
                && layer.group != group
            {
                group = layer.group;
                segments.clear();
                segments.extend(batch.runs.iter().map(|run| Segment {
                    start: run.start,
                    len: run.len,
                    context: run.context,
                    table: tables.offsets(run.slot, group),
                }));
            }
            step.run(launch, rows, &batch.positions, &segments, memory, false);
        }
        memory.segments = recycle(segments);
    }

    fn logits(&mut self, rows: &[u32]) -> &mut [f32] {
        let Self { pool, head, rotations, memory, mla_form, .. } = self;
        let (from, to) = (self.hidden, self.chosen);
        let hidden = memory.arena.one(from, memory.rows);
        let chosen = memory.head_arena.one(to, rows.len());
        for (out, &row) in chosen.chunks_exact_mut(to.width).zip(rows) {
            let at = row as usize * from.width;
            out.copy_from_slice(&hidden[at..at + from.width]);
        }
        let step = Step { pool, rotations, form: *mla_form, ids: &[] };
        for launch in head.iter() {
            step.run(launch, rows.len(), &[], &[], memory, true);
        }
        memory.head_arena.one(self.logits, rows.len())
    }

    fn tile(&self) -> usize {
        self.tile
    }
}

/// What every launch of a step sees.
struct Step<'a> {
    pool: &'a ThreadPool,
    rotations: &'a [Rotation],
    form: MlaForm,
    ids: &'a [u32],
}

impl Step<'_> {
    fn run(
        &self,
        launch: &Launch<'_>,
        rows: usize,
        positions: &[u32],
        segments: &[Segment<'_>],
        memory: &mut Memory,
        in_head: bool,
    ) {
        let pool = self.pool;
        let Memory { arena, head_arena, scratch, moe: moe_scratch, routing, kv, .. } = memory;
        let arena = if in_head { head_arena } else { arena };
        match launch {
            Launch::Embed { table, first_row, out } => {
                ops::embed::embed(pool, self.ids, *first_row, *table, arena.one(*out, rows));
            }
            Launch::Norm { x, weight, eps, out } => {
                let [x, out] = arena.two([*x, *out], rows);
                ops::norm::rms_norm(pool, x, weight, *eps, out);
            }
            Launch::AddNorm { delta, residual, weight, eps, out } => {
                let [delta, residual, out] = arena.three([*delta, *residual, *out], rows);
                ops::norm::add_rms_norm(pool, delta, residual, weight, *eps, out);
            }
            Launch::Add { x, target } => {
                let [x, target] = arena.two([*x, *target], rows);
                ops::act::add(pool, x, target);
            }
            Launch::HeadNorm { x, heads, weight, eps } => {
                ops::norm::head_norm(pool, arena.one(*x, rows), heads, weight, *eps);
            }
            Launch::Rope { x, heads, rotation } => {
                let Rotation { inv_freq, factor, pairing } = &self.rotations[*rotation];
                let rope = Rope { inv_freq, factor: *factor, pairing: *pairing };
                ops::rope::rope(pool, arena.one(*x, rows), heads, positions, &rope);
            }
            Launch::Linear { x, parts, biases, out } => {
                let mut lent: [&[f32]; MAX_PARTS] = [&[]; MAX_PARTS];
                lent.iter_mut().zip(biases).for_each(|(lent, bias)| *lent = bias);
                let biases = &lent[..biases.len()];
                let [x, out] = arena.two([*x, *out], rows);
                ops::linear::linear(pool, x, rows, parts, biases, out, scratch);
            }
            Launch::WriteKv { rows: x, layer } => {
                let x = arena.one(*x, rows);
                ops::paged::write_kv(x, layer.kv, segments, &mut kv.write());
            }
            Launch::Gqa { q, shape, layer, out } => {
                let [q, out] = arena.two([*q, *out], rows);
                ops::gqa::attention(pool, q, shape, layer.kv, segments, kv.read(), out);
            }
            Launch::Mla { q, shape, kv_b, layer, out } => {
                let [q, out] = arena.two([*q, *out], rows);
                let (b, kv, layer) = (*kv_b, kv.read(), layer.kv);
                let form = match self.form {
                    MlaForm::Auto => {
                        ops::mla::attention(pool, q, b, shape, layer, segments, kv, out, scratch);
                        return;
                    }
                    MlaForm::Absorbed => Form::Absorbed,
                    MlaForm::Expanded => Form::Expanded,
                };
                let isa = Isa::detect();
                ops::mla::attention_as(
                    form, isa, pool, q, b, shape, layer, segments, kv, out, scratch,
                );
            }
            Launch::SiluMul { gate_up, out } => {
                let n = out.width;
                let [gate_up, out] = arena.two([*gate_up, *out], rows);
                ops::act::silu_mul(pool, gate_up, n, out);
            }
            Launch::Route { logits, router, correction } => {
                let router = moe::Router { correction: correction.as_deref(), ..*router };
                let choices = rows * router.top_k;
                let Routing { experts, weights, top_k } = routing;
                *top_k = router.top_k;
                let logits = arena.one(*logits, rows);
                let (experts, weights) = (&mut experts[..choices], &mut weights[..choices]);
                moe::route(pool, logits, &router, experts, weights);
            }
            Launch::Experts { x, experts, out } => {
                let [x, out] = arena.two([*x, *out], rows);
                let choices = rows * routing.top_k;
                let chosen = moe::Routing {
                    experts: &routing.experts[..choices],
                    weights: &routing.weights[..choices],
                    top_k: routing.top_k,
                };
                let weights = moe::ExpertWeights {
                    first: experts.first,
                    gate: &experts.gate,
                    up: &experts.up,
                    down: &experts.down,
                };
                if let Some(scratch) = moe_scratch {
                    moe::experts(pool, x, &chosen, &weights, out, scratch);
                }
            }
        }
    }
}

impl Launch<'_> {
    /// The cache layer an op works on.
    const fn layer(&self) -> Option<Layer> {
        match self {
            Self::WriteKv { layer, .. } | Self::Gqa { layer, .. } | Self::Mla { layer, .. } => {
                Some(*layer)
            }
            _ => None,
        }
    }
}
