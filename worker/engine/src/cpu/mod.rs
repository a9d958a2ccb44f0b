//! The CPU executor: walks the resolved op list over preallocated memory, and exchanges with other ranks
//! where the list says so.
//!
//! No op allocates and none is chosen here. Invariant: after `configure` a forward touches only
//! memory that exists.

mod arena;
mod exchange;
mod kv;
mod launch;
mod run;

pub(crate) use launch::local_router;

use crate::batch::Batch;
use crate::copies::BlockCopy;
use crate::executor::{Collected, DeviceTime, Executor, RowDraw, TableView, Tile};
use crate::memory::HEAD_ROWS;
use crate::{EngineError, KvDtype, MlaForm, Options, WeightSource};
use arena::{Arena, Rows};
use core::ops::Range;
use device::ThreadPool;
use device::collectives::{CollectiveError, Collectives};
use exchange::Exchange;
use ids::Bytes;
use kv::KvMemory;
use launch::{Experts, Launch, Layer, Place, Resolver, Rotation};
use model::lower::Lowered;
use ops::moe;
use ops::paged::Segment;
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
    kv_dtype: KvDtype,
    exchange: Option<Exchange>,
    /// Bytes that came from other ranks in the step at hand, by op of the body and the head.
    moved: Vec<u64>,
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
    rows: Rows,
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

/// An empty vector's memory for elements of another lifetime: the same layout, so that collecting
/// nothing reuses it.
fn recycle<'b>(mut segments: Vec<Segment<'_>>) -> Vec<Segment<'b>> {
    segments.clear();
    segments.into_iter().map(|segment| Segment { table: &[], ..segment }).collect()
}

impl<'w> Cpu<'w> {
    /// Resolves the program of a rank; `collectives` are there where it is one of several.
    pub(crate) fn new(
        lowered: Lowered,
        source: &'w dyn WeightSource,
        options: &Options,
        collectives: Option<Box<dyn Collectives>>,
    ) -> Result<Self, EngineError> {
        let resolver = Resolver { lowered: &lowered, source };
        let logits = resolver.place(lowered.logits);
        let (body, head) = (resolver.launches(&lowered.body)?, resolver.launches(&lowered.head)?);
        let end = |collectives| Exchange::new(collectives, lowered.mesh, lowered.rank);
        Ok(Self {
            pool: ThreadPool::new(options.threads),
            moved: vec![0; body.len() + head.len()],
            body,
            head,
            exchange: collectives.map(end),
            rotations: resolver.rotations(),
            hidden: resolver.place(lowered.hidden),
            chosen: resolver.place(lowered.chosen),
            tile: (MAX_TILE_ELEMENTS / logits.width.max(1)).clamp(1, HEAD_ROWS),
            logits,
            body_width: lowered.body_width,
            head_width: lowered.head_width,
            mla_form: options.mla_form,
            kv_dtype: options.kv_dtype,
            spent: Duration::ZERO,
            memory: Memory {
                arena: Arena::default(),
                head_arena: Arena::default(),
                scratch: Vec::new(),
                moe: None,
                routing: Routing::default(),
                kv: KvMemory::new(options.kv_dtype, 0, 0),
                rows: Rows::default(),
                segments: Vec::new(),
            },
        })
    }

    /// Allocates activations for `tokens` rows, scratch, the cache, and the memory behind it.
    pub(crate) fn configure(
        &mut self,
        tokens: usize,
        (cache_bytes, host_bytes): (u64, u64),
    ) -> Result<(), EngineError> {
        let body = self
            .body_width
            .checked_mul(tokens)
            .ok_or(EngineError::Memory { what: "activations", bytes: Bytes(u64::MAX) })?;
        let length = |what, bytes| {
            usize::try_from(bytes).map_err(|_| EngineError::Memory { what, bytes: Bytes(bytes) })
        };
        let cache = length("the cache", cache_bytes)?;
        let host = length("the memory behind the cache", host_bytes)?;
        let (scratch, choices) = (self.scratch_len(tokens), self.choices(tokens));
        let moe = self.experts().map(|(x, experts)| experts.scratch(&self.pool, tokens * x.shards));
        let memory = &mut self.memory;
        memory.arena.allocate(body);
        memory.head_arena.allocate(self.head_width * self.tile);
        memory.kv = KvMemory::new(self.kv_dtype, cache, host);
        memory.scratch = vec![0.0; scratch];
        memory.moe = moe;
        memory.routing =
            Routing { top_k: 0, experts: vec![0; choices], weights: vec![0.0; choices] };
        Ok(())
    }

    /// The first expert layer; those of a model have one shape.
    fn experts(&self) -> Option<(&Place, &Experts<'w>)> {
        self.body.iter().find_map(|launch| match launch {
            Launch::Experts { x, experts, .. } => Some((x, experts)),
            _ => None,
        })
    }

    /// Bytes that came from other ranks in the last step, by op of the body, then of the head.
    pub(crate) fn moved(&self) -> &[u64] {
        &self.moved
    }

    /// Elements of scratch that the neediest op wants.
    fn scratch_len(&self, tokens: usize) -> usize {
        let launches = self.body.iter().chain(&self.head);
        launches.map(|launch| scratch_len(&self.pool, launch, tokens)).max().unwrap_or(0)
    }

    /// Choices that a router makes where each shard has `tokens` tokens.
    fn choices(&self, tokens: usize) -> usize {
        let choices = self.body.iter().map(|launch| match launch {
            Launch::Route { logits, router, .. } => router.top_k * logits.shards,
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
    type Error = CollectiveError;

    fn copy_blocks(&mut self, copies: &[BlockCopy]) -> Result<(), CollectiveError> {
        self.memory.kv.copy(copies);
        Ok(())
    }

    fn enqueue(
        &mut self,
        batch: &Batch,
        tables: &TableView<'_>,
        _: &[Option<RowDraw>],
    ) -> Result<bool, CollectiveError> {
        let began = Instant::now();
        let Self { pool, body, rotations, memory, mla_form, exchange, moved, .. } = self;
        let own = batch.ids.len();
        let rows = match exchange {
            Some(exchange) => {
                exchange.begin_step(batch.step);
                Rows { own, padded: batch.bucket }
            }
            None => Rows::exactly(own),
        };
        let step = Step {
            pool,
            rotations,
            form: *mla_form,
            ids: &batch.ids,
            positions: &batch.positions,
            rows,
            in_head: false,
            shard_rows: &batch.shard_rows,
        };
        memory.rows = rows;
        moved.fill(0);
        let mut segments = recycle(core::mem::take(&mut memory.segments));
        let mut group = usize::MAX;
        for (launch, moved) in body.iter().zip(moved) {
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
            *moved = step.run(launch, &segments, memory, exchange.as_mut())?;
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
    ) -> Result<Tile<'_>, CollectiveError> {
        let began = Instant::now();
        let wanted = &batch.wanted[wanted];
        let Self { pool, body, head, rotations, memory, mla_form, exchange, moved, .. } = self;
        let (from, to) = (self.hidden, self.chosen);
        let hidden = memory.arena.one(from, memory.rows);
        let rows = Rows::exactly(wanted.len());
        let chosen = memory.head_arena.one(to, rows);
        for (out, wanted) in chosen.chunks_exact_mut(to.width).zip(wanted) {
            let at = wanted.row as usize * from.width;
            out.copy_from_slice(&hidden[at..at + from.width]);
        }
        let step = Step {
            pool,
            rotations,
            form: *mla_form,
            ids: &[],
            positions: &[],
            rows,
            in_head: true,
            shard_rows: &[],
        };
        for (launch, moved) in head.iter().zip(&mut moved[body.len()..]) {
            *moved += step.run(launch, &[], memory, exchange.as_mut())?;
        }
        self.spent += began.elapsed();
        let logits = memory.head_arena.one(self.logits, rows);
        Ok(Tile { logits, drawn: &[], described: &[], described_row: 0 })
    }

    fn ready(&self) -> Result<bool, CollectiveError> {
        Ok(true)
    }

    fn collect(&mut self) -> Result<Collected<'_>, CollectiveError> {
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
