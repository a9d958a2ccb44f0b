//! The CPU executor: walks the resolved op list over preallocated memory.
//!
//! No op allocates and none is chosen here. Invariant: after `configure` a forward touches only
//! memory that exists.

mod arena;
mod launch;
mod run;

pub(crate) use launch::local_router;

use crate::batch::Batch;
use crate::executor::{Collected, DeviceTime, Executor, RowDraw, TableView, Tile};
use crate::memory::HEAD_ROWS;
use crate::{EngineError, KvDtype, MlaForm, Options, WeightSource};
use arena::Arena;
use core::ops::Range;
use device::ThreadPool;
use device::cuda::CudaError;
use half::bf16;
use half::vec::HalfBitsVecExt;
use ids::Bytes;
use launch::{Experts, Launch, Layer, Place, Resolver, Rotation};
use model::lower::Lowered;
use ops::moe;
use ops::paged::{Kv, KvMut, Segment};
use run::Step;
use std::time::{Duration, Instant};

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
    /// In the step at hand.
    spent: Duration,
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
            tile: (MAX_TILE_ELEMENTS / logits.width.max(1)).clamp(1, HEAD_ROWS),
            logits,
            body_width: lowered.body_width,
            head_width: lowered.head_width,
            mla_form: options.mla_form,
            spent: Duration::ZERO,
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
        let body = self
            .body_width
            .checked_mul(tokens)
            .ok_or(EngineError::Memory { what: "activations", bytes: Bytes(u64::MAX) })?;
        let cache = usize::try_from(cache_bytes)
            .map_err(|_| EngineError::Memory { what: "the cache", bytes: Bytes(cache_bytes) })?;
        let (scratch, choices) = (self.scratch_len(tokens), self.choices(tokens));
        let moe = self.experts().map(|experts| experts.scratch(&self.pool, tokens));
        let memory = &mut self.memory;
        memory.arena.allocate(body);
        memory.head_arena.allocate(self.head_width * self.tile);
        memory.kv = match memory.kv {
            // Zeroed pages come from the system when first touched, so this is quick and lazy: for
            // numbers of the language, while a vector of any other type is written through.
            KvMemory::F32(_) => KvMemory::F32(vec![0.0; cache / 4]),
            KvMemory::Bf16(_) => KvMemory::Bf16(vec![0_u16; cache / 2].reinterpret_into()),
        };
        memory.scratch = vec![0.0; scratch];
        memory.moe = moe;
        memory.routing =
            Routing { top_k: 0, experts: vec![0; choices], weights: vec![0.0; choices] };
        Ok(())
    }

    /// The first expert layer; those of a model have one shape.
    fn experts(&self) -> Option<&Experts<'w>> {
        self.body.iter().find_map(|launch| match launch {
            Launch::Experts { experts, .. } => Some(experts),
            _ => None,
        })
    }

    /// Elements of scratch that the neediest op wants.
    fn scratch_len(&self, tokens: usize) -> usize {
        let launches = self.body.iter().chain(&self.head);
        launches.map(|launch| scratch_len(&self.pool, launch, tokens)).max().unwrap_or(0)
    }

    /// Choices that a router makes for `tokens` tokens.
    fn choices(&self, tokens: usize) -> usize {
        let choices = self.body.iter().map(|launch| match launch {
            Launch::Route { router, .. } => router.top_k,
            _ => 0,
        });
        choices.max().unwrap_or(0) * tokens
    }
}

/// Elements of scratch that an op needs for `tokens` rows.
fn scratch_len(pool: &ThreadPool, launch: &Launch<'_>, tokens: usize) -> usize {
    match launch {
        Launch::Linear { x, .. } => ops::linear::scratch_len(pool, x.width),
        Launch::Gqa { shape, .. } => ops::gqa::scratch_len(pool, shape),
        Launch::Mla { shape, .. } => ops::mla::scratch_len(pool, shape, tokens),
        _ => 0,
    }
}

impl Executor for Cpu<'_> {
    fn enqueue(
        &mut self,
        batch: &Batch,
        tables: &TableView<'_>,
        _: &[Option<RowDraw>],
    ) -> Result<bool, CudaError> {
        let began = Instant::now();
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
        self.spent = began.elapsed();
        Ok(false)
    }

    fn finish(
        &mut self,
        batch: &Batch,
        wanted: Range<usize>,
        _: &[Option<RowDraw>],
    ) -> Result<Tile<'_>, CudaError> {
        let began = Instant::now();
        let wanted = &batch.wanted[wanted];
        let Self { pool, head, rotations, memory, mla_form, .. } = self;
        let (from, to) = (self.hidden, self.chosen);
        let hidden = memory.arena.one(from, memory.rows);
        let chosen = memory.head_arena.one(to, wanted.len());
        for (out, wanted) in chosen.chunks_exact_mut(to.width).zip(wanted) {
            let at = wanted.row as usize * from.width;
            out.copy_from_slice(&hidden[at..at + from.width]);
        }
        let step = Step { pool, rotations, form: *mla_form, ids: &[] };
        for launch in head.iter() {
            step.run(launch, wanted.len(), &[], &[], memory, true);
        }
        self.spent += began.elapsed();
        let logits = memory.head_arena.one(self.logits, wanted.len());
        Ok(Tile { logits, drawn: &[], described: &[], described_row: 0 })
    }

    fn ready(&self) -> Result<bool, CudaError> {
        Ok(true)
    }

    fn collect(&mut self) -> Result<Collected<'_>, CudaError> {
        let time = DeviceTime { run_ns: self.spent.as_nanos() as u64, ..DeviceTime::default() };
        Ok(Collected { tokens: &[], faults: &[], time })
    }

    fn tile(&self, _: &[Option<RowDraw>]) -> usize {
        self.tile
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
