//! What a case is.

use crate::near::Failure;
use crate::rig::Rig;
use device::cuda::CudaError;
use ops::cuda::Queue;

/// Enqueues one launch, or the launches of one layer, over the operands of a set.
pub(crate) type Launch = Box<dyn Fn(Queue<'_>, usize) -> Result<(), CudaError>>;
/// Runs a launch and compares some of its results.
pub(crate) type Check = Box<dyn Fn(&Rig, &Launch) -> Result<(), Failure>>;
type Setup = Box<dyn Fn(&mut Rig) -> Result<Ready, Failure>>;

/// What one launch must move and compute at least.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Work {
    /// Bytes read, those written counted with them.
    pub(crate) bytes: f64,
    /// Bytes of both directions where as many are written as read; 0 elsewhere.
    pub(crate) copied: f64,
    /// Multiplications and additions on tensor cores.
    pub(crate) flops: f64,
    /// Whether operands are in the cache, so that memory is no bound.
    pub(crate) cached: bool,
}

impl Work {
    pub(crate) fn bytes(bytes: usize) -> Self {
        Self { bytes: bytes as f64, ..Self::default() }
    }

    pub(crate) fn copied(bytes: usize) -> Self {
        Self { copied: bytes as f64, ..Self::default() }
    }

    /// Of operands that stay in the cache.
    pub(crate) fn cached(bytes: usize) -> Self {
        Self { cached: true, ..Self::bytes(bytes) }
    }

    pub(crate) fn and_flops(self, flops: f64) -> Self {
        Self { flops, ..self }
    }
}

/// Operands laid out.
pub(crate) struct Ready {
    pub(crate) work: Work,
    /// Sets of operands that launches go over in turn.
    pub(crate) sets: usize,
    pub(crate) launch: Launch,
    pub(crate) check: Check,
}

/// One kernel, or the kernels of one layer, at one shape.
pub struct Case {
    name: String,
    setup: Setup,
}

impl Case {
    pub(crate) fn new(
        name: String,
        setup: impl Fn(&mut Rig) -> Result<Ready, Failure> + 'static,
    ) -> Self {
        Self { name, setup: Box::new(setup) }
    }

    /// Op and shape, like `mla_decode.h16.bs1.ctx8192`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn setup(&self, rig: &mut Rig) -> Result<Ready, Failure> {
        (self.setup)(rig)
    }
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Case").field("name", &self.name).finish_non_exhaustive()
    }
}
