//! The CUDA side of the ops: the kernels of the program on one device, and how operands are given.
//!
//! Each op's launches are in its own module `cuda`. A launch enqueues and returns; it allocates
//! nothing, reads nothing back, and takes every number of rows from device memory, so any sequence of
//! launches can be captured into a graph. Kernels come ready from the build; where it had no
//! compiler, [`Gpu::new`] says so. Sums are f32 whatever the elements are.

mod operand;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use crate::{flash, linear, moe};
use device::cuda::{Context, CudaError, DeviceFacts, DeviceSlice, Kernel, Kernels, Lane, Stream};

pub(crate) use built::JITTER;
pub use operand::Strided;
pub(crate) use operand::{apart, bytes, dim, need, shape};

mod built {
    //! What the build script made.
    include!(concat!(env!("OUT_DIR"), "/cubins.rs"));
}

/// Element type of activations, weights and cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// 4 bytes; for tests and tiny models.
    F32,
    /// 2 bytes.
    Bf16,
}

impl Dtype {
    /// Bytes of an element.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    /// The kernel for this type.
    pub(crate) const fn pick(self, f32: &'static str, bf16: &'static str) -> &'static str {
        match self {
            Self::F32 => f32,
            Self::Bf16 => bf16,
        }
    }
}

/// Memory with the type of its elements.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    /// Where.
    pub slice: &'a DeviceSlice,
    /// Of what.
    pub dtype: Dtype,
}

impl<'a> Tensor<'a> {
    /// A tensor over all of `slice`.
    #[must_use]
    pub const fn new(slice: &'a DeviceSlice, dtype: Dtype) -> Self {
        Self { slice, dtype }
    }

    pub(crate) fn address(&self) -> u64 {
        self.slice.address()
    }

    /// Elements.
    pub(crate) const fn len(&self) -> usize {
        self.slice.bytes() / self.dtype.size()
    }

    /// Refused where it holds fewer elements than `factors` multiply to.
    pub(crate) fn need(
        &self,
        op: &'static str,
        what: &'static str,
        factors: &[usize],
    ) -> Result<(), CudaError> {
        need(op, what, self.slice, factors, self.dtype.size())
    }
}

/// Rows of a step: as many as the bucket has, and where the device finds how many are real.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// Grids cover this many.
    pub padded: usize,
    /// One `u32` with the real number; `None` where all are.
    pub count: Option<&'a DeviceSlice>,
}

impl Rows<'_> {
    /// All rows are real.
    #[must_use]
    pub const fn exactly(rows: usize) -> Self {
        Self { padded: rows, count: None }
    }

    pub(crate) fn count_address(&self) -> u64 {
        self.count.map_or(0, DeviceSlice::address)
    }
}

/// What the kernels are compiled for.
const CAPABILITY: (u32, u32) = (9, 0);

/// Whether this program holds kernels for a device.
///
/// # Errors
/// When it holds none, or others; the error says what to do.
pub fn check(facts: &DeviceFacts) -> Result<(), CudaError> {
    const OTHERS: &str = "those it holds are for compute capability 9.0 (H100, H200); run on the \
        processor";
    if built::CUBINS.is_empty() {
        return Err(CudaError::NoKernels { reason: built::MISSING });
    }
    if facts.capability != CAPABILITY {
        return Err(CudaError::NoKernels { reason: OTHERS });
    }
    Ok(())
}

/// The kernels on one device, and what memory they share: its launches go to one stream.
#[derive(Debug)]
pub struct Gpu {
    kernels: Kernels,
    facts: DeviceFacts,
    /// One for each lane of streams.
    shared: [linear::cuda::wide::Shared; Lane::COUNT],
    counters: [moe::cuda::stream::Counters; Lane::COUNT],
    /// Of prompt attention, which one lane has.
    prompts: flash::cuda::prompt::Shared,
    products: linear::cuda::Opening,
}

impl Gpu {
    /// Loads every kernel of the program.
    ///
    /// # Errors
    /// When the program was built without kernels, or they do not fit the device.
    pub fn new(context: &Context) -> Result<Self, CudaError> {
        check(context.facts())?;
        Self::with(context, linear::cuda::Opening::begin(context))
    }

    fn with(context: &Context, products: linear::cuda::Opening) -> Result<Self, CudaError> {
        let facts = context.facts().clone();
        check(&facts)?;
        let kernels = Kernels::load(context, built::CUBINS, built::MISSING)?;
        kernels.allow_shared(crate::sample::cuda::HOLDING, facts.shared_bytes)?;
        // Attributes are set once, so that launches only launch.
        use crate::flash::cuda::prompt;
        use crate::mla::cuda::{decode, near};
        let large = crate::linear::cuda::MANY.iter().chain(crate::flash::cuda::ALL);
        let large = large
            .chain(crate::moe::cuda::wide::LARGE)
            .chain(crate::moe::cuda::many::LARGE)
            .chain(crate::mla::cuda::heads::LARGE)
            .chain(crate::gqa::cuda::decode::ALL)
            .chain(&decode::LARGE)
            .chain(linear::cuda::stream::LARGE)
            .chain(near::LARGE)
            .copied()
            .chain(prompt::ALL);
        for name in large.chain(linear::cuda::wide::large()) {
            kernels.allow_shared(name, facts.shared_bytes)?;
        }
        let shared = || linear::cuda::wide::Shared::new(context);
        let shared = [shared()?, shared()?];
        let counters = || moe::cuda::stream::Counters::new(context);
        let counters = [counters()?, counters()?];
        let prompts = prompt::Shared::new(context)?;
        Ok(Self { kernels, facts, shared, counters, prompts, products })
    }

    /// Bytes of device memory that [`Gpu::new`] allocates, the library's included.
    #[must_use]
    pub fn bytes(multiprocessors: usize) -> usize {
        let shared = linear::cuda::wide::Shared::bytes(multiprocessors);
        let counters = moe::cuda::stream::Counters::BYTES;
        Lane::COUNT * (shared + counters + linear::cuda::Library::WORKSPACE)
            + flash::cuda::prompt::Shared::bytes(multiprocessors)
    }

    /// As [`Gpu::new`], where the library of products counts as absent.
    ///
    /// # Errors
    /// As [`Gpu::new`].
    pub fn without_library(context: &Context) -> Result<Self, CudaError> {
        Self::with(context, linear::cuda::Opening::without())
    }

    /// The vendor's library of products, or why everything runs on the kernels here. The first call may
    /// wait for it.
    ///
    /// # Errors
    /// When it is not there; the error says what was looked for.
    pub fn cublaslt(&self) -> Result<&linear::cuda::Library, &CudaError> {
        self.products.end()
    }

    /// What the device is.
    #[must_use]
    pub const fn facts(&self) -> &DeviceFacts {
        &self.facts
    }

    /// All kernels; for reports on registers and the like.
    #[must_use]
    pub const fn kernels(&self) -> &Kernels {
        &self.kernels
    }
}

/// Where launches go.
#[derive(Clone, Copy, Debug)]
pub struct Queue<'a> {
    /// With which kernels.
    pub gpu: &'a Gpu,
    /// In which order.
    pub stream: &'a Stream,
}

impl<'a> Queue<'a> {
    pub(crate) fn kernel(&self, name: &str) -> Result<&'a Kernel, CudaError> {
        self.gpu.kernels.get(name)
    }

    /// Where sums of split products meet.
    pub(crate) fn shared(&self) -> &'a linear::cuda::wide::Shared {
        &self.gpu.shared[self.stream.lane() as usize]
    }

    /// What blocks of a launch of few tokens' experts count.
    pub(crate) fn counters(&self) -> &'a moe::cuda::stream::Counters {
        &self.gpu.counters[self.stream.lane() as usize]
    }

    /// What blocks of prompt attention share.
    pub(crate) const fn prompts(&self) -> &'a flash::cuda::prompt::Shared {
        &self.gpu.prompts
    }

    /// Multiprocessors of the device.
    pub(crate) const fn multiprocessors(&self) -> usize {
        self.gpu.facts.multiprocessors as usize
    }
}
