//! What runs a batch. The engine decides nothing about how; an executor nothing about what.

use crate::EngineError;
use crate::batch::Batch;
use crate::cpu::Cpu;
use crate::cuda::Cuda;
use crate::slots::Slots;
use core::ops::Range;
use device::cuda::CudaError;
use ops::sample::cuda::SampleRow;
use std::time::Duration;
use step::StartPhase;

/// Where the block tables of a batch's slots are found.
pub struct TableView<'a> {
    slots: &'a Slots,
}

impl<'a> TableView<'a> {
    pub(crate) const fn new(slots: &'a Slots) -> Self {
        Self { slots }
    }

    /// Element offsets of the logical blocks of `slot` in a cache group.
    #[must_use]
    pub fn offsets(&self, slot: ids::SlotId, group: usize) -> &'a [u64] {
        self.slots.row(slot).tables.offsets(group)
    }
}

/// What came of some rows.
pub struct Tile<'a> {
    /// `[rows, vocab]`; empty where a token was drawn of every row.
    pub logits: &'a mut [f32],
    /// Tokens, then faults (see [`ops::sample::cuda::fault`]), of rows that were to be drawn; empty
    /// where the executor draws nothing.
    pub drawn: &'a [u32],
}

/// Runs batches of one model on one device. Only a device fails; after that nothing may be asked of
/// the executor any more.
pub trait Executor {
    /// All rows through the model; their KV is written, their hidden states kept until the next
    /// call. What is enqueued on a device may fail later, in whatever waits for it.
    ///
    /// # Errors
    /// When the device does.
    fn forward(&mut self, batch: &Batch, tables: &TableView<'_>) -> Result<(), CudaError>;

    /// Some of the wanted rows of the last forward, whose batch this is; at most [`Executor::tile`].
    /// `draws` says of each row how its token is drawn where that may happen beside the logits.
    ///
    /// # Errors
    /// When the device does.
    fn finish(
        &mut self,
        batch: &Batch,
        wanted: Range<usize>,
        draws: &[Option<SampleRow>],
    ) -> Result<Tile<'_>, CudaError>;

    /// Most rows of one call of [`Executor::finish`].
    fn tile(&self) -> usize;
}

/// The executors there are.
pub(crate) enum Backend<'w> {
    Cpu(Box<Cpu<'w>>),
    Cuda(Box<Cuda>),
}

impl Backend<'_> {
    /// As the worker's hello says it.
    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::Cpu(_) => "cpu",
            Self::Cuda(_) => "cuda",
        }
    }

    /// Parts of the start that ended since the last call; none where loading is not the executor's.
    pub(crate) fn take_phases(&mut self) -> Vec<(StartPhase, Duration)> {
        match self {
            Self::Cpu(_) => Vec::new(),
            Self::Cuda(cuda) => cuda.take_phases(),
        }
    }

    /// Allocates for steps of up to `tokens` tokens of `slots` requests with contexts of up to
    /// `context`, and the cache.
    pub(crate) fn configure(
        &mut self,
        (tokens, slots, context): (usize, usize, usize),
        cache_bytes: u64,
    ) -> Result<(), EngineError> {
        match self {
            Self::Cpu(cpu) => cpu.configure(tokens, cache_bytes),
            Self::Cuda(cuda) => cuda.configure((tokens, slots, context), cache_bytes),
        }
    }
}

impl Executor for Backend<'_> {
    fn forward(&mut self, batch: &Batch, tables: &TableView<'_>) -> Result<(), CudaError> {
        match self {
            Self::Cpu(cpu) => cpu.forward(batch, tables),
            Self::Cuda(cuda) => cuda.forward(batch, tables),
        }
    }

    fn finish(
        &mut self,
        batch: &Batch,
        wanted: Range<usize>,
        draws: &[Option<SampleRow>],
    ) -> Result<Tile<'_>, CudaError> {
        match self {
            Self::Cpu(cpu) => cpu.finish(batch, wanted, draws),
            Self::Cuda(cuda) => cuda.finish(batch, wanted, draws),
        }
    }

    fn tile(&self) -> usize {
        match self {
            Self::Cpu(cpu) => cpu.tile(),
            Self::Cuda(cuda) => cuda.tile(),
        }
    }
}
