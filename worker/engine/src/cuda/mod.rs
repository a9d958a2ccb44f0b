//! The CUDA executor: the resolved op list enqueued on one stream, over memory that was cut when the
//! engine was configured.
//!
//! Activations, matrices and cache share one element type. No op allocates and none is chosen here;
//! kernels read the numbers of rows and tiles on the device, so a step of a bucket differs from
//! another in data alone. Tokens are drawn on the device and kept there, so that the next step is
//! enqueued behind this one. Where log-probabilities are asked for, of prompts too, the next step waits for
//! this one; logits come back to the host for lists longer than their places alone. A step that only decodes
//! is a copy, a launch and a copy back. Invariant: enqueueing waits for nothing but a copy of the step before
//! the last.

mod ahead;
mod asked;
mod behind;
mod capture;
mod draw;
mod facts;
mod fold;
mod fuse;
mod graphs;
mod inputs;
mod launch;
mod limits;
mod moe_layer;
mod rest;
mod run;
mod sizes;
mod units;
mod weights;

pub use facts::{CudaDevice, cuda_device};
pub use graphs::{Captured, GRAPH_BYTES};
pub(crate) use sizes::alignment;
pub use sizes::{CudaBytes, cuda_attention, cuda_bytes};

use crate::batch::Batch;
use crate::copies::BlockCopy;
use crate::executor::{Collected, Executor, RowDraw, TableView, Tile};
use crate::phases::Phases;
use crate::{EngineError, KvDtype, MlaForm, Options, WeightSource};
use ahead::{Ahead, Stretch};
use asked::Asked;
use behind::Behind;
use core::ops::Range;
use device::cuda::{Arena, Context, CudaError, DeviceMemory, DeviceSlice, Download, Stream};
use draw::Draws;
use graphs::{Absorbed, Graphs, Kind, Later};
use inputs::Inputs;
use launch::{Activations, Launch, Place, Region, Resolver};
use limits::Limits;
use model::lower::Lowered;
use ops::cuda::{Dtype, Gpu, Queue, Rows, Tensor};
use ops::flash::cuda::Partials;
use ops::rope::Pairing;
use ops::tokens::cuda::{Begin, begin};
use ops::{embed, gqa, mla, moe};
use rest::{Chosen, Rest};
use run::{Beside, Rotation, Scratch, Step};
use sizes::{ExpertShape, Sizes};
use std::time::Duration;
use step::StartPhase;
use weights::Loaded;
pub(crate) use weights::Report;
use zerocopy::FromBytes;

/// The elements of activations, which are those of the cache.
const fn dtype_of(kv: KvDtype) -> Dtype {
    match kv {
        KvDtype::F32 => Dtype::F32,
        KvDtype::Bf16 => Dtype::Bf16,
    }
}

/// Runs one rank's program on a device.
pub(crate) struct Cuda {
    body: Vec<Launch>,
    /// What of it only some rows run in steps with prompts.
    rest: Option<Rest>,
    head: Vec<Launch>,
    rotations: Vec<Rotation>,
    sizes: Sizes,
    hidden: Place,
    chosen: Place,
    logits: Place,
    capture: bool,
    /// Which launch of steps is made to fail.
    failing_launch: Option<u64>,
    /// What took how long until now.
    phases: Phases,
    /// What is to be told.
    notes: Vec<String>,
    memory: Option<Memory>,
    gpu: Gpu,
    stream: Stream,
    beside: Beside,
    context: Context,
}

/// Everything that a step writes.
struct Memory {
    /// First, so that they end before the memory they name.
    graphs: Graphs,
    limits: Limits,
    inputs: Inputs,
    activations: Activations,
    chosen: Chosen,
    scratch: Scratch,
    cache: DeviceSlice,
    behind: Behind,
    ahead: Ahead,
    asked: Asked,
    draws: Draws,
    download: Download,
    /// Padded rows of the last forward.
    bucket: usize,
}

impl Cuda {
    /// Opens the device, sends the weights and resolves a program for one rank.
    pub(crate) fn new(
        ordinal: usize,
        lowered: &Lowered,
        source: &dyn WeightSource,
        options: &Options,
        report: Report<'_>,
    ) -> Result<Self, EngineError> {
        if options.mla_form == MlaForm::Expanded {
            let why = "the expanded form on a CUDA device".to_owned();
            return Err(CudaError::Shape { op: "mla", why }.into());
        }
        let mut phases = Phases::begin();
        let context = Context::open(ordinal)?;
        phases.end(StartPhase::Device);
        let (gpu, stream) = (Gpu::new(&context)?, Stream::new(&context)?);
        let beside = Beside::new(&context)?;
        phases.end(StartPhase::Kernels);
        let dtype = dtype_of(options.kv_dtype);
        let sizes = Sizes::new(lowered, dtype, options.mla_form == MlaForm::Auto);
        let queue = Queue { gpu: &gpu, stream: &stream };
        let how = (options.threads, report);
        let loaded = Loaded::load(&context, queue, lowered, source, dtype, how)?;
        phases.end(StartPhase::Weights);
        let resolver = |region| Resolver { lowered, sizes: &sizes, loaded: &loaded, region };
        let (body, head) = (resolver(Region::Body), resolver(Region::Head));
        let rotations = lowered.ropes.iter().zip(&loaded.frequencies);
        let rotations = rotations.map(|(rope, inv_freq)| Rotation {
            inv_freq: inv_freq.clone(),
            factor: rope.attention_factor(),
            pairing: if rope.interleaved { Pairing::Interleaved } else { Pairing::Halves },
        });
        let launches = body.launches(&lowered.body)?;
        Ok(Self {
            rotations: rotations.collect(),
            hidden: body.place(lowered.hidden),
            chosen: head.place(lowered.chosen),
            logits: head.place(lowered.logits),
            rest: rest::find(lowered, &launches, |id| body.place(id)),
            body: launches,
            head: head.launches(&lowered.head)?,
            capture: options.graphs,
            failing_launch: options.failing_launch,
            phases,
            notes: Vec::new(),
            memory: None,
            sizes,
            gpu,
            stream,
            beside,
            context,
        })
    }

    /// Allocates everything that steps within the limits use, the cache, and the memory behind it.
    pub(crate) fn configure(
        &mut self,
        (rows, slots, context): (usize, usize, usize),
        (cache_bytes, host_bytes): (u64, u64),
    ) -> Result<(), EngineError> {
        self.context.enter()?;
        self.memory = None;
        self.phases.restart();
        let multiprocessors = self.gpu.facts().multiprocessors as usize;
        let limits = Limits { rows, slots, context, multiprocessors };
        let sizes = &self.sizes;
        let cache = usize::try_from(cache_bytes).unwrap_or(usize::MAX);
        let cache = DeviceMemory::allocate(&self.context, "the KV cache", cache)?;
        let behind = Behind::new(&self.context, host_bytes, sizes.dtype)?;
        let bytes = sizes.step_bytes(&limits);
        let mut arena = Arena::new(DeviceMemory::allocate(&self.context, "steps", bytes)?);
        let arena = &mut arena;
        let (lines, v_width) = sizes.partials(&limits);
        let partials = Partials::take(arena, lines, v_width)?;
        let mla = |mla| mla::cuda::Scratch::take(arena, mla, sizes.dtype, rows);
        let mla = sizes.mla.as_ref().map(mla).transpose()?;
        let expanded = |(mla, room)| mla::cuda::expand::Scratch::take(arena, mla, room);
        let expanded = sizes.expanded(&limits).map(expanded).transpose()?;
        let latent = |slots| {
            let map = mla::cuda::decode::cache_map(&cache)?;
            Ok::<_, CudaError>((map, mla::cuda::decode::Partials::take(arena, slots)?))
        };
        let latent = sizes.latent_slots(&limits).map(latent).transpose()?;
        let grouped = |(slots, width)| {
            let maps = sizes.specs.iter().map(|spec| spec.cache_map(&cache));
            let maps = maps.collect::<Result<Vec<_>, _>>()?;
            let partials = gqa::cuda::decode::Partials::take(arena, &self.stream, slots, width)?;
            Ok::<_, CudaError>((maps, partials))
        };
        let grouped = sizes.grouped_slots(&limits).map(grouped).transpose()?;
        let moe = |shape| {
            let ExpertShape { top_k, held, hidden, intermediate } = shape;
            moe::cuda::Scratch::take(arena, sizes.dtype, rows, top_k, held, hidden, intermediate)
        };
        let moe = sizes.experts.map(moe).transpose()?;
        let mut choices = || arena.take("routing", sizes.choice_bytes(&limits));
        let choices = [choices()?, choices()?];
        let activations = Activations::take(arena, sizes, &limits)?;
        let mut memory = Memory {
            chosen: Chosen::take(arena, &self.stream, (sizes, &limits), &activations)?,
            graphs: Graphs::new(),
            inputs: Inputs::take(&self.context, arena, sizes, &limits)?,
            activations,
            scratch: Scratch { partials, mla, expanded, latent, grouped, moe, choices },
            cache,
            behind,
            ahead: Ahead::take(&self.context, &self.stream, arena, &limits)?,
            asked: Asked::take(&self.context, arena, sizes, &limits)?,
            draws: Draws::take(&self.context, &self.stream, arena, sizes)?,
            download: Download::new(&self.context, sizes.host_bytes())?,
            bucket: 0,
            limits,
        };
        self.phases.end(StartPhase::Memory);
        if self.capture {
            self.capture(&mut memory)?;
        }
        self.phases.end(StartPhase::Graphs);
        self.notes = vec![ops::linear::cuda::statement(&self.gpu)];
        self.memory = Some(memory);
        if let Some(launch) = self.failing_launch {
            self.stream.plant_failure(launch);
        }
        Ok(())
    }

    /// How often each kernel was enqueued or captured until now, of those that were.
    pub(crate) fn launches(&self) -> Vec<(String, u64)> {
        let kernels = self.gpu.kernels().iter().filter(|kernel| kernel.launches() > 0);
        kernels.map(|kernel| (kernel.name().to_owned(), kernel.launches())).collect()
    }

    /// What captured steps launch.
    pub(crate) fn captured(&self) -> Vec<Captured> {
        self.memory.iter().flat_map(|memory| memory.graphs.captured()).collect()
    }

    /// What took how long since the last call.
    pub(crate) fn take_phases(&mut self) -> Vec<(StartPhase, Duration)> {
        self.phases.take()
    }

    /// What an operator may want to know, once: what was chosen at the start, and what went otherwise since.
    pub(crate) fn take_notes(&mut self) -> Vec<String> {
        let graphs = self.memory.as_mut().map(|memory| memory.graphs.take_notes());
        self.notes.drain(..).chain(graphs.into_iter().flatten()).collect()
    }

    /// The step in front of the launches of `rows` rows.
    fn step<'a>(
        &'a self,
        memory: &'a Memory,
        rows: Rows<'a>,
        ids: &'a DeviceSlice,
        prompts: bool,
    ) -> Result<Step<'a>, CudaError> {
        Ok(Step {
            on: self.queue(),
            beside: &self.beside,
            rows,
            ids,
            views: memory.inputs.views(memory.bucket)?,
            prompts,
            absorbed: Absorbed::Chunks,
            near: false,
            passes: &[],
            whole: true,
            limits: &memory.limits,
            sizes: &self.sizes,
            rotations: &self.rotations,
            activations: &memory.activations,
            scratch: &memory.scratch,
            cache: &memory.cache,
        })
    }

    /// Launches on either stream so far.
    fn launched(&self) -> u64 {
        self.stream.launched() + self.beside.stream.launched()
    }

    fn queue(&self) -> Queue<'_> {
        Queue { gpu: &self.gpu, stream: &self.stream }
    }

    /// Enqueues the body for a batch whose inputs were sent; where there are prompts as far as all rows
    /// run it, else with the draws: then no more rows are wanted than there are.
    fn enqueue_body(&self, memory: &Memory, kind: Kind, passes: &[usize]) -> Result<(), CudaError> {
        let views = memory.inputs.views(memory.bucket)?;
        let rows = Rows { padded: memory.bucket, count: Some(&views.count) };
        let operands = Begin {
            staged: &views.ids,
            last: &memory.ahead.last,
            ids: &memory.inputs.ids,
            changes: &views.changes,
            changed: &views.changed,
            tables: &views.tables,
        };
        begin(self.queue(), rows, &operands)?;
        let step = self.step(memory, rows, &memory.inputs.ids, kind.prompts)?;
        Step { passes, whole: kind.whole, absorbed: kind.absorbed, near: kind.near, ..step }
            .run_all(self.captured_body(kind.prompts))?;
        match kind.prompts {
            true => Ok(()),
            false => self.enqueue_draws(memory, memory.bucket, false, kind.greedy),
        }
    }

    /// Enqueues logits and draws of the first `all` wanted rows, tile by tile. Unless all of them are
    /// `real`, the device knows how many are.
    fn enqueue_draws(
        &self,
        memory: &Memory,
        all: usize,
        real: bool,
        greedy: bool,
    ) -> Result<(), CudaError> {
        let views = memory.inputs.views(memory.bucket)?;
        let lists = &memory.asked.lists();
        for (first, count) in (0..all).step_by(self.sizes.drawn_tile).zip(&views.heads) {
            let padded = self.sizes.drawn_tile.min(all - first);
            let rows = Rows { padded, count: (!real).then_some(count) };
            self.enqueue_head(memory, first, rows)?;
            let logits = &memory.activations.at(self.logits, padded);
            let stretch = Stretch { first, rows, logits, greedy };
            memory.ahead.draw(
                self.queue(),
                &stretch,
                (all, self.sizes.vocab),
                (&views.how, lists),
            )?;
        }
        memory.ahead.keep(self.queue(), all, &views.kept)
    }

    /// Enqueues the head for some of the wanted rows.
    fn enqueue_head(&self, memory: &Memory, first: usize, rows: Rows<'_>) -> Result<(), CudaError> {
        let views = memory.inputs.views(memory.bucket)?;
        let (hidden, table_rows, ids) = match memory.chosen.hidden(self.hidden, first) {
            Some(chosen) => chosen,
            None => {
                let ids = views.wanted.slice(first * 4..(first + rows.padded) * 4);
                (memory.activations.at(self.hidden, memory.bucket), memory.bucket, ids)
            }
        };
        let step = self.step(memory, rows, &ids, false)?;
        // Choosing rows of hidden states is looking them up.
        let choose = embed::cuda::Embed {
            ids: &ids,
            table: Tensor::new(&hidden, self.sizes.dtype),
            table_rows,
            first_row: 0,
            width: self.chosen.width,
            out: &memory.activations.at(self.chosen, rows.padded),
        };
        embed::cuda::embed(step.on, rows, &choose)?;
        step.run_all(&self.head)
    }

    /// Enqueues a step: inputs, body, and where all `draws` may happen here those and the way back
    /// of tokens. Returns whether that is so.
    fn enqueue_step(
        &self,
        memory: &mut Memory,
        batch: &Batch,
        tables: &TableView<'_>,
        draws: &[Option<RowDraw>],
    ) -> Result<bool, CudaError> {
        let before = self.launched();
        memory.bucket = memory.limits.bucket(batch.ids.len());
        memory.chosen.none();
        let (bucket, prompts) = (memory.bucket, inputs::has_prompts(batch));
        let here = draws.iter().all(|draw| draw.is_some_and(|draw| !draw.describes()));
        memory.asked.fill(self.queue(), batch, tables, draws)?;
        memory.inputs.send(&self.stream, batch, bucket, tables, here.then_some(draws))?;
        memory.ahead.begin(&self.stream)?;
        let greedy = draws.iter().flatten().all(|draw| draw.how.is_greedy());
        let few = !prompts && bucket <= self.near_rows();
        let near = few && mla::cuda::near::fits(batch.runs.iter().map(|run| run.context));
        let absorbed = match prompts && self.sizes.expands() {
            true => inputs::absorbed(batch),
            false => Absorbed::Chunks,
        };
        let later = Later::of(memory.inputs.passes());
        let whole = later == Some(Later::NONE) || inputs::has_whole(batch);
        let greedy_only = greedy && !prompts;
        let kind =
            |later| Kind { bucket, prompts, absorbed, greedy: greedy_only, near, later, whole };
        let graph = later.and_then(|later| memory.graphs.get(kind(later)));
        let captured = graph.map(|graph| graph.launch(&self.stream)).transpose()?.is_some();
        if !captured {
            let kind = kind(later.unwrap_or_default());
            self.enqueue_body(memory, kind, memory.inputs.passes())?;
        }
        if prompts {
            self.enqueue_rest(memory, batch.wanted.len())?;
        }
        let wanted = if here { draws.len() } else { 0 };
        if prompts && wanted > 0 {
            self.enqueue_draws(memory, wanted, true, greedy)?;
        }
        let rows = if prompts { wanted } else { bucket };
        memory.ahead.end(&self.stream, wanted, rows)?;
        let graphs = self.capture.then(|| (memory.graphs.len(), captured));
        memory.ahead.launched(self.launched() - before, graphs);
        let later = later.filter(|later| self.capture && !captured && *later != Later::NONE);
        if let Some(later) = later.filter(|_| memory.graphs.has_room()) {
            // The device is busy with this step, which has prompts behind a context: it is long, and neither
            // capturing nor instantiating waits for it or stops it.
            let kind = kind(later);
            let made = self.capture_later(memory, kind, memory.inputs.passes());
            memory.graphs.insert_later(kind, made);
        }
        Ok(here)
    }

    /// Enqueues the logits of some wanted rows, the draws of those that are drawn here, and the way
    /// back of what is needed on the host.
    fn enqueue_tile(
        &self,
        memory: &mut Memory,
        wanted: &Range<usize>,
        draws: &[Option<RowDraw>],
    ) -> Result<(), CudaError> {
        let some = draws.iter().any(Option::is_some);
        if some {
            memory.draws.send(&self.stream, draws)?;
        }
        self.enqueue_head(memory, wanted.start, Rows::exactly(wanted.len()))?;
        let logits = memory.activations.at(self.logits, wanted.len());
        if some {
            let lists = memory.asked.lists();
            memory.draws.enqueue(
                self.queue(),
                &logits,
                (wanted.len(), self.sizes.vocab),
                &lists,
            )?;
        }
        if draws.iter().any(Option::is_none) {
            memory.download.start(&self.stream, &logits)?;
        }
        memory.ahead.extend(&self.stream)
    }
}

/// What a step before the configuration is told.
fn not_configured() -> CudaError {
    CudaError::Shape { op: "forward", why: "a step before the configuration".to_owned() }
}

impl Executor for Cuda {
    type Error = CudaError;

    fn copy_blocks(&mut self, copies: &[BlockCopy]) -> Result<(), CudaError> {
        self.context.enter()?;
        let Memory { behind, cache, .. } = self.memory.as_mut().ok_or_else(not_configured)?;
        behind.copy(&self.stream, cache, copies)
    }

    fn enqueue(
        &mut self,
        batch: &Batch,
        tables: &TableView<'_>,
        draws: &[Option<RowDraw>],
    ) -> Result<bool, CudaError> {
        self.context.enter()?;
        let mut memory = self.memory.take().ok_or_else(not_configured)?;
        let enqueued = self.enqueue_step(&mut memory, batch, tables, draws);
        self.memory = Some(memory);
        enqueued
    }

    fn finish(
        &mut self,
        _: &Batch,
        wanted: Range<usize>,
        draws: &[Option<RowDraw>],
    ) -> Result<Tile<'_>, CudaError> {
        self.context.enter()?;
        let mut memory = self.memory.take().ok_or_else(not_configured)?;
        let enqueued = self.enqueue_tile(&mut memory, &wanted, draws);
        let memory = self.memory.insert(memory);
        enqueued?;
        let described_row = memory.draws.described_row();
        let (drawn, described) = match draws.iter().any(Option::is_some) {
            true => memory.draws.wait(wanted.len())?,
            false => (&[][..], &[][..]),
        };
        let elements = match draws.iter().all(Option::is_some) {
            true => 0,
            false => wanted.len() * self.sizes.vocab,
        };
        let bytes = &mut memory.download.wait()?[..elements * 4];
        let logits = <[f32]>::mut_from_bytes(bytes)
            .map_err(|e| CudaError::Shape { op: "logits", why: e.to_string() })?;
        Ok(Tile { logits, drawn, described, described_row })
    }

    fn ready(&self) -> Result<bool, CudaError> {
        self.memory.as_ref().map_or(Ok(true), |memory| memory.ahead.ready())
    }

    fn collect(&mut self) -> Result<Collected<'_>, CudaError> {
        self.context.enter()?;
        self.memory.as_mut().ok_or_else(not_configured)?.ahead.collect()
    }

    fn tile(&self, draws: &[Option<RowDraw>]) -> usize {
        match draws.iter().all(Option::is_some) {
            true => self.sizes.drawn_tile,
            // Logits go to the host.
            false => self.sizes.tile,
        }
    }
}
