//! What runs a batch. The engine decides nothing about how; an executor nothing about what.

use crate::EngineError;
use crate::batch::Batch;
use crate::copies::BlockCopy;
use crate::cpu::Cpu;
use crate::cuda::{Captured, Cuda};
use crate::sampler::SamplerState;
use crate::slots::Slots;
use core::ops::Range;
use device::collectives::CollectiveError;
use device::cuda::CudaError;
use ops::sample::cuda::{SampleRow, UNWANTED};
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

    /// The life that has `slot`. Its tables only grow, but for blocks that nothing reads any more.
    #[must_use]
    pub fn life(&self, slot: ids::SlotId) -> Option<ids::SlotGeneration> {
        self.slots.row(slot).generation
    }

    /// What the life in `slot` asks of its draws.
    pub(crate) fn asked(&self, slot: ids::SlotId) -> Option<Asked<'a>> {
        let life = self.slots.row(slot).life.as_ref()?;
        let (tokens, prompt) = (life.tokens.as_slice(), life.prompt.as_usize());
        Some(Asked { tokens, prompt, state: &life.sampler })
    }

    /// Element offsets of the logical blocks of `slot` in a cache group.
    #[must_use]
    pub fn offsets(&self, slot: ids::SlotId, group: usize) -> &'a [u64] {
        self.slots.row(slot).tables.offsets(group)
    }
}

/// What the life in a slot asks of a draw beyond a row of parameters.
pub(crate) struct Asked<'a> {
    /// Tokens known at admission, of which the first `prompt` are the client's.
    pub(crate) tokens: &'a [u32],
    pub(crate) prompt: usize,
    pub(crate) state: &'a SamplerState,
}

/// How a wanted row's token is drawn where that may happen beside the logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowDraw {
    /// Its parameters; places of lists and counts are those of its slot.
    pub how: SampleRow,
    /// How many of the likeliest tokens are listed with the one drawn, with log-probabilities;
    /// [`UNWANTED`] where none are asked for.
    pub listed: u32,
    /// A token that is known already: nothing is drawn, it is described.
    pub given: Option<u32>,
}

impl RowDraw {
    /// Whether log-probabilities are asked for.
    #[must_use]
    pub const fn describes(&self) -> bool {
        self.listed != UNWANTED
    }
}

/// What came of some rows.
pub struct Tile<'a> {
    /// `[rows, vocab]`; empty where a token was drawn of every row.
    pub logits: &'a mut [f32],
    /// Tokens, then faults (see [`ops::sample::cuda::fault`]), of rows that were to be drawn; empty
    /// where the executor draws nothing.
    pub drawn: &'a [u32],
    /// [`ops::sample::cuda::TokenLogprob`] in words, `described_row` of each row: the token drawn, then
    /// the likeliest; empty where no row asks for them.
    pub described: &'a [[u32; 3]],
    /// Entries of a row.
    pub described_row: usize,
}

/// What a step took of a device; zeros where nothing is measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceTime {
    /// From its first launch to the end of its last.
    pub run_ns: u64,
    /// From the end of the step before to its first launch: nothing ran.
    pub idle_ns: u64,
    /// Kernels, graphs and copies that the host launched.
    pub launches: u32,
    /// Kinds of steps that are captured.
    pub graphs: u32,
    /// Whether its body was launched op by op though steps are captured.
    pub uncaptured: bool,
}

/// A step that is over.
#[derive(Clone, Copy, Debug)]
pub struct Collected<'a> {
    /// Tokens of the wanted rows; empty where [`Executor::enqueue`] said so.
    pub tokens: &'a [u32],
    /// As many faults, see [`ops::sample::cuda::fault`].
    pub faults: &'a [u32],
    /// What it took.
    pub time: DeviceTime,
}

/// Why an executor fails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExecutorError {
    /// Its device did.
    Cuda(CudaError),
    /// Ranks could not exchange.
    Collective(CollectiveError),
}

impl From<CudaError> for ExecutorError {
    fn from(error: CudaError) -> Self {
        Self::Cuda(error)
    }
}

impl From<CollectiveError> for ExecutorError {
    fn from(error: CollectiveError) -> Self {
        Self::Collective(error)
    }
}

/// Runs batches of one model on one device. Only a device fails, or another rank; after that nothing may be
/// asked of the executor any more.
pub trait Executor {
    /// What fails.
    type Error: Into<ExecutorError>;

    /// Copies blocks between the cache and the memory behind it, in order, behind every step that was
    /// enqueued before and in front of all that follow.
    ///
    /// # Errors
    /// When the device does.
    fn copy_blocks(&mut self, copies: &[BlockCopy]) -> Result<(), Self::Error>;

    /// All rows through the model; their KV is written. What is enqueued on a device may fail later,
    /// in whatever waits for it. `draws` says of each wanted row how its token is drawn where that may
    /// happen beside the logits.
    ///
    /// Returns whether all wanted tokens are drawn and kept for the next step too, which may be
    /// enqueued before this one is collected. Otherwise hidden states are kept, and
    /// [`Executor::finish`] comes next.
    ///
    /// # Errors
    /// When the device does.
    fn enqueue(
        &mut self,
        batch: &Batch,
        tables: &TableView<'_>,
        draws: &[Option<RowDraw>],
    ) -> Result<bool, Self::Error>;

    /// Some of the wanted rows of the last step, whose batch and draws these are; at most
    /// [`Executor::tile`].
    ///
    /// # Errors
    /// When the device does.
    fn finish(
        &mut self,
        batch: &Batch,
        wanted: Range<usize>,
        draws: &[Option<RowDraw>],
    ) -> Result<Tile<'_>, Self::Error>;

    /// Whether [`Executor::collect`] would not wait.
    ///
    /// # Errors
    /// When the device does.
    fn ready(&self) -> Result<bool, Self::Error>;

    /// Waits for the oldest step that was enqueued and not collected.
    ///
    /// # Errors
    /// When the device does.
    fn collect(&mut self) -> Result<Collected<'_>, Self::Error>;

    /// Most rows of one call of [`Executor::finish`] for a step with these draws.
    fn tile(&self, draws: &[Option<RowDraw>]) -> usize;
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

    /// How often each kernel was launched; empty where launches have no names.
    pub(crate) fn launches(&self) -> Vec<(String, u64)> {
        match self {
            Self::Cpu(_) => Vec::new(),
            Self::Cuda(cuda) => cuda.launches(),
        }
    }

    /// What captured steps launch; empty where nothing is captured.
    pub(crate) fn captured(&self) -> Vec<Captured> {
        match self {
            Self::Cpu(_) => Vec::new(),
            Self::Cuda(cuda) => cuda.captured(),
        }
    }

    /// Bytes that came from other ranks in the last step, by op; empty where no ranks exchange.
    pub(crate) fn moved(&self) -> &[u64] {
        match self {
            Self::Cpu(cpu) => cpu.moved(),
            Self::Cuda(_) => &[],
        }
    }

    /// Parts of the start that ended since the last call; none where loading is not the executor's.
    pub(crate) fn take_phases(&mut self) -> Vec<(StartPhase, Duration)> {
        match self {
            Self::Cpu(_) => Vec::new(),
            Self::Cuda(cuda) => cuda.take_phases(),
        }
    }

    /// What an operator may want to know, once.
    pub(crate) fn take_notes(&mut self) -> Vec<String> {
        match self {
            Self::Cpu(_) => Vec::new(),
            Self::Cuda(cuda) => cuda.take_notes(),
        }
    }

    /// Allocates for steps of up to `tokens` tokens of `slots` requests with contexts of up to
    /// `context`, the cache, and the memory behind it.
    pub(crate) fn configure(
        &mut self,
        (tokens, slots, context): (usize, usize, usize),
        (cache_bytes, host_bytes): (u64, u64),
    ) -> Result<(), EngineError> {
        let bytes = (cache_bytes, host_bytes);
        match self {
            Self::Cpu(cpu) => cpu.configure(tokens, bytes),
            Self::Cuda(cuda) => cuda.configure((tokens, slots, context), bytes),
        }
    }
}

impl Executor for Backend<'_> {
    type Error = ExecutorError;

    fn copy_blocks(&mut self, copies: &[BlockCopy]) -> Result<(), ExecutorError> {
        match self {
            Self::Cpu(cpu) => Ok(cpu.copy_blocks(copies)?),
            Self::Cuda(cuda) => Ok(cuda.copy_blocks(copies)?),
        }
    }

    fn enqueue(
        &mut self,
        batch: &Batch,
        tables: &TableView<'_>,
        draws: &[Option<RowDraw>],
    ) -> Result<bool, ExecutorError> {
        match self {
            Self::Cpu(cpu) => Ok(cpu.enqueue(batch, tables, draws)?),
            Self::Cuda(cuda) => Ok(cuda.enqueue(batch, tables, draws)?),
        }
    }

    fn finish(
        &mut self,
        batch: &Batch,
        wanted: Range<usize>,
        draws: &[Option<RowDraw>],
    ) -> Result<Tile<'_>, ExecutorError> {
        match self {
            Self::Cpu(cpu) => Ok(cpu.finish(batch, wanted, draws)?),
            Self::Cuda(cuda) => Ok(cuda.finish(batch, wanted, draws)?),
        }
    }

    fn ready(&self) -> Result<bool, ExecutorError> {
        match self {
            Self::Cpu(cpu) => Ok(cpu.ready()?),
            Self::Cuda(cuda) => Ok(cuda.ready()?),
        }
    }

    fn collect(&mut self) -> Result<Collected<'_>, ExecutorError> {
        match self {
            Self::Cpu(cpu) => Ok(cpu.collect()?),
            Self::Cuda(cuda) => Ok(cuda.collect()?),
        }
    }

    fn tile(&self, draws: &[Option<RowDraw>]) -> usize {
        match self {
            Self::Cpu(cpu) => cpu.tile(draws),
            Self::Cuda(cuda) => cuda.tile(draws),
        }
    }
}
