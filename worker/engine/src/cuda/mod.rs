//! The CUDA executor: the resolved op list enqueued on one stream, over memory that was cut when the
//! engine was configured.
//!
//! Activations, matrices and cache share one element type. No op allocates and none is chosen here;
//! kernels read the numbers of rows and tiles on the device, so a step of a bucket differs from
//! another in data alone. Logits come back to the host, where tokens are drawn. Invariant: a step
//! sends its inputs in one copy and waits only for logits.

mod facts;
mod inputs;
mod launch;
mod limits;
mod run;
mod sizes;
mod weights;

pub use facts::{CudaDevice, cuda_device};
pub use sizes::{CudaBytes, cuda_bytes};

use crate::batch::Batch;
use crate::executor::{Executor, TableView};
use crate::{EngineError, KvDtype, MlaForm, Options, WeightSource};
use core::ops::Range;
use device::cuda::{Arena, Context, CudaError, DeviceMemory, DeviceSlice, Download, Stream};
use inputs::Inputs;
use launch::{Activations, Launch, Place, Region, Resolver};
use limits::Limits;
use model::lower::Lowered;
use ops::cuda::{Dtype, Gpu, Queue, Rows, Tensor};
use ops::flash::cuda::Partials;
use ops::rope::Pairing;
use ops::{embed, mla, moe};
use run::{Rotation, Scratch, Step};
use sizes::{ExpertShape, Sizes};
use weights::Loaded;
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
    head: Vec<Launch>,
    rotations: Vec<Rotation>,
    sizes: Sizes,
    hidden: Place,
    chosen: Place,
    logits: Place,
    memory: Option<Memory>,
    gpu: Gpu,
    stream: Stream,
    context: Context,
}

/// Everything that a step writes.
struct Memory {
    limits: Limits,
    inputs: Inputs,
    activations: Activations,
    scratch: Scratch,
    cache: DeviceSlice,
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
    ) -> Result<Self, EngineError> {
        if options.mla_form == MlaForm::Expanded {
            let why = "the expanded form on a CUDA device".to_owned();
            return Err(CudaError::Shape { op: "mla", why }.into());
        }
        let context = Context::open(ordinal)?;
        let (gpu, stream) = (Gpu::new(&context)?, Stream::new(&context)?);
        let dtype = dtype_of(options.kv_dtype);
        let sizes = Sizes::new(lowered, dtype);
        let queue = Queue { gpu: &gpu, stream: &stream };
        let loaded = Loaded::load(&context, queue, lowered, source, dtype)?;
        let resolver = |region| Resolver { lowered, sizes: &sizes, loaded: &loaded, region };
        let (body, head) = (resolver(Region::Body), resolver(Region::Head));
        let rotations = lowered.ropes.iter().zip(&loaded.frequencies);
        let rotations = rotations.map(|(rope, inv_freq)| Rotation {
            inv_freq: inv_freq.clone(),
            factor: rope.attention_factor(),
            pairing: if rope.interleaved { Pairing::Interleaved } else { Pairing::Halves },
        });
        Ok(Self {
            rotations: rotations.collect(),
            hidden: body.place(lowered.hidden),
            chosen: head.place(lowered.chosen),
            logits: head.place(lowered.logits),
            body: body.launches(&lowered.body)?,
            head: head.launches(&lowered.head)?,
            memory: None,
            sizes,
            gpu,
            stream,
            context,
        })
    }

    /// Allocates everything that steps within the limits use, and the cache.
    pub(crate) fn configure(
        &mut self,
        (rows, slots, context): (usize, usize, usize),
        cache_bytes: u64,
    ) -> Result<(), EngineError> {
        self.context.enter()?;
        self.memory = None;
        let multiprocessors = self.gpu.facts().multiprocessors as usize;
        let limits = Limits { rows, slots, context, multiprocessors };
        let sizes = &self.sizes;
        let cache = usize::try_from(cache_bytes).unwrap_or(usize::MAX);
        let cache = DeviceMemory::allocate(&self.context, "the KV cache", cache)?;
        let bytes = sizes.step_bytes(&limits);
        let mut arena = Arena::new(DeviceMemory::allocate(&self.context, "steps", bytes)?);
        let arena = &mut arena;
        let (lines, v_width) = sizes.partials(&limits);
        let mla = |mla| mla::cuda::Scratch::take(arena, mla, sizes.dtype, rows, lines);
        let mla = sizes.mla.as_ref().map(mla).transpose()?;
        let partials = mla.is_none().then(|| Partials::take(arena, lines, v_width)).transpose()?;
        let moe = |shape| {
            let ExpertShape { top_k, held, hidden, intermediate } = shape;
            moe::cuda::Scratch::take(arena, sizes.dtype, rows, top_k, held, hidden, intermediate)
        };
        let moe = sizes.experts.map(moe).transpose()?;
        let mut choices = || arena.take("routing", sizes.choice_bytes(&limits));
        let choices = [choices()?, choices()?];
        self.memory = Some(Memory {
            inputs: Inputs::take(&self.context, arena, sizes, &limits)?,
            activations: Activations::take(arena, sizes, &limits)?,
            scratch: Scratch { partials, mla, moe, choices },
            cache,
            download: Download::new(&self.context, sizes.logits_bytes())?,
            bucket: 0,
            limits,
        });
        Ok(())
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
            on: Queue { gpu: &self.gpu, stream: &self.stream },
            rows,
            ids,
            views: memory.inputs.views(memory.bucket)?,
            prompts,
            limits: &memory.limits,
            sizes: &self.sizes,
            rotations: &self.rotations,
            activations: &memory.activations,
            scratch: &memory.scratch,
            cache: &memory.cache,
        })
    }

    /// Enqueues the body for a batch whose inputs were sent.
    fn enqueue_body(&self, memory: &Memory, prompts: bool) -> Result<(), CudaError> {
        let views = memory.inputs.views(memory.bucket)?;
        let rows = Rows { padded: memory.bucket, count: Some(&views.count) };
        let step = self.step(memory, rows, &views.ids, prompts)?;
        self.body.iter().try_for_each(|launch| step.run(launch))
    }

    /// Enqueues the head for some of the wanted rows.
    fn enqueue_head(&self, memory: &Memory, wanted: &Range<usize>) -> Result<(), CudaError> {
        let views = memory.inputs.views(memory.bucket)?;
        let rows = Rows::exactly(wanted.len());
        let ids = views.wanted.slice(wanted.start * 4..wanted.end * 4);
        let step = self.step(memory, rows, &ids, false)?;
        // Choosing rows of hidden states is looking them up.
        let hidden = memory.activations.at(self.hidden, memory.bucket);
        let choose = embed::cuda::Embed {
            ids: &ids,
            table: Tensor::new(&hidden, self.sizes.dtype),
            table_rows: memory.bucket,
            first_row: 0,
            width: self.chosen.width,
            out: &memory.activations.at(self.chosen, wanted.len()),
        };
        embed::cuda::embed(step.on, rows, &choose)?;
        self.head.iter().try_for_each(|launch| step.run(launch))
    }
}

/// What a step before the configuration is told.
fn not_configured() -> CudaError {
    CudaError::Shape { op: "forward", why: "a step before the configuration".to_owned() }
}

impl Executor for Cuda {
    fn forward(&mut self, batch: &Batch, tables: &TableView<'_>) -> Result<(), CudaError> {
        self.context.enter()?;
        let mut memory = self.memory.take().ok_or_else(not_configured)?;
        memory.bucket = memory.limits.bucket(batch.ids.len());
        let sent = memory.inputs.send(&self.stream, batch, memory.bucket, tables);
        let prompts = inputs::has_prompts(batch);
        let run = sent.and_then(|()| self.enqueue_body(&memory, prompts));
        self.memory = Some(memory);
        run
    }

    fn logits(&mut self, _: &Batch, wanted: Range<usize>) -> Result<&mut [f32], CudaError> {
        self.context.enter()?;
        let memory = self.memory.as_ref().ok_or_else(not_configured)?;
        self.enqueue_head(memory, &wanted)?;
        let logits = memory.activations.at(self.logits, wanted.len());
        let memory = self.memory.as_mut().ok_or_else(not_configured)?;
        memory.download.start(&self.stream, &logits)?;
        let bytes = &mut memory.download.wait()?[..logits.bytes()];
        <[f32]>::mut_from_bytes(bytes)
            .map_err(|e| CudaError::Shape { op: "logits", why: e.to_string() })
    }

    fn tile(&self) -> usize {
        self.sizes.tile
    }
}
