//! Products by cuBLASLt, for so many rows that arithmetic bounds them.
//!
//! The library is opened when the program comes to the device. Where it is not found the kernels here
//! compute everything, and [`Gpu::cublaslt`](crate::cuda::Gpu::cublaslt) says so. Products with a bias
//! and those of rows of which only some are real (the library computes all) stay
//! with the kernels here. A shape is planned when it is first asked for, which is when graphs are
//! captured; large ones by timing what the library proposes, so that the order of sums, and with it last
//! bits, may differ between two starts of the program. Invariant: which of the two computes a product
//! depends on its shape alone.

use super::{Linear, Then, WIDE};
use crate::cuda::{Dtype, Queue, Rows, shape};
use device::cuda::{
    Blas, BlasPlan, Context, CudaError, DeviceMemory, DeviceSlice, Lane, Product, Stream,
};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;

/// The library, memory for it, and what it planned.
#[derive(Debug)]
pub struct Library {
    blas: Blas,
    /// One for each lane of streams.
    workspaces: [DeviceSlice; Lane::COUNT],
    /// Where plans are timed.
    timing: Stream,
    /// `None` where the library has no way.
    plans: Mutex<BTreeMap<Product, Option<Arc<BlasPlan>>>>,
}

impl Library {
    /// Bytes that products of one lane may use beside their operands.
    pub(crate) const WORKSPACE: usize = 32 << 20;

    /// Opens it on a context that is current.
    fn open(context: &Context) -> Result<Self, CudaError> {
        let blas = Blas::open(context)?;
        let what = "the library's workspace";
        let workspace = || DeviceMemory::allocate(context, what, Self::WORKSPACE);
        let workspaces = [workspace()?, workspace()?];
        let timing = Stream::new(context)?;
        Ok(Self { blas, workspaces, timing, plans: Mutex::default() })
    }

    /// Major and minor version.
    #[must_use]
    pub const fn version(&self) -> (usize, usize) {
        self.blas.version()
    }

    /// How many shapes are planned.
    #[must_use]
    pub fn planned(&self) -> usize {
        let plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        plans.values().flatten().count()
    }

    fn workspace(&self, on: Queue<'_>) -> &DeviceSlice {
        &self.workspaces[on.stream.lane() as usize]
    }

    fn plan(
        &self,
        on: Queue<'_>,
        rows: Rows<'_>,
        operands: &Linear<'_>,
    ) -> Result<Option<Arc<BlasPlan>>, CudaError> {
        let Linear { x, x_stride, w, out, out_stride, inputs, outputs, .. } = *operands;
        let exact = out.dtype == Dtype::F32;
        let product = Product { rows: rows.padded, outputs, inputs, x_stride, out_stride, exact };
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = plans.get(&product) {
            return Ok(plan.clone());
        }
        let mut plan = self.blas.plan(product, Self::WORKSPACE)?;
        if let Some(plan) = plan.as_mut().filter(|_| product.operations() >= TIMED) {
            if !on.stream.is_capturing()? {
                on.stream.synchronize()?;
            }
            let memory = [w, x.slice, out.slice, self.workspace(on)];
            self.timing.beside_capture(|stream| self.blas.choose(plan, stream, memory))?;
        }
        let plan = plan.map(Arc::new);
        plans.insert(product, plan.clone());
        Ok(plan)
    }
}

/// The library while it is being opened: it is large, and weights can be loaded meanwhile. Invariant:
/// whoever drops it waits for the thread, since a process that ends while a library is still being loaded
/// crashes in what both take down.
#[derive(Debug)]
pub(crate) struct Opening {
    thread: Mutex<Option<JoinHandle<Result<Library, CudaError>>>>,
    opened: OnceLock<Result<Library, CudaError>>,
}

impl Opening {
    /// Begins.
    pub(crate) fn begin(context: &Context) -> Self {
        let context = context.clone();
        Self::by(move || {
            context.enter()?;
            Library::open(&context)
        })
    }

    fn by(open: impl FnOnce() -> Result<Library, CudaError> + Send + 'static) -> Self {
        Self { thread: Mutex::new(Some(std::thread::spawn(open))), opened: OnceLock::new() }
    }

    /// There shall be none.
    pub(crate) fn without() -> Self {
        let reason = "is not wanted".to_owned();
        let none = Err(CudaError::NoLibrary { library: "libcublasLt", reason });
        Self { thread: Mutex::new(None), opened: OnceLock::from(none) }
    }

    /// Waits for it the first time.
    pub(crate) fn end(&self) -> Result<&Library, &CudaError> {
        let join = || {
            let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
            let outcome = thread.and_then(|thread| thread.join().ok());
            let reason = "could not be opened".to_owned();
            let lost = CudaError::NoLibrary { library: "libcublasLt", reason };
            outcome.unwrap_or(Err(lost))
        };
        self.opened.get_or_init(join).as_ref()
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

/// Operations of a product from which on its plan's ways are timed: a launch takes less time then.
const TIMED: usize = 16 << 30;
/// Rows above which the library was measured to be faster, and above which it was for products of the
/// shape that [`faster`] describes.
pub(super) const ROWS: usize = 64;
const SOME_ROWS: usize = 32;
/// Most rows that products have outside of captured steps.
const LOOSE_ROWS: usize = 256;

/// Whether the library is asked for a product, where it is there.
///
/// Planning takes the library a millisecond, so numbers of rows must be few: up to [`LOOSE_ROWS`] they
/// are those that steps are padded to.
pub(crate) const fn faster(rows: usize, outputs: usize, inputs: usize) -> bool {
    /// Elements of weights up to which reading them does not hide everything else.
    const SMALL: usize = 32 << 20;
    let padded = rows.is_power_of_two() || (rows.is_multiple_of(3) && (rows / 3).is_power_of_two());
    let some = outputs >= inputs && outputs.saturating_mul(inputs) <= SMALL;
    (rows > ROWS || (rows > SOME_ROWS && some)) && (rows > LOOSE_ROWS || padded)
}

/// Whether the library can compute the operands: one product of bf16 with whole 16-byte units
/// everywhere, stored as it comes, of rows that are all but padding.
fn takes(operands: &Linear<'_>) -> bool {
    let Linear { out, out_stride, outputs, batch, bias, then, .. } = *operands;
    operands.is_aligned()
        && batch == 1
        && bias.is_none()
        && then == Then::Store
        && outputs.is_multiple_of(WIDE)
        && out_stride.is_multiple_of(WIDE)
        && out.address().is_multiple_of(16)
}

/// How the library computes the product; `None` where it is absent, cannot, or is not worth it.
pub(super) fn plan(
    on: Queue<'_>,
    rows: Rows<'_>,
    operands: &Linear<'_>,
) -> Result<Option<Arc<BlasPlan>>, CudaError> {
    let Linear { inputs, outputs, .. } = *operands;
    match on.gpu.cublaslt() {
        Ok(library) if faster(rows.padded, outputs, inputs) && takes(operands) => {
            library.plan(on, rows, operands)
        }
        _ => Ok(None),
    }
}

/// The product as planned, or as it is planned now; lengths are checked against the plan.
pub(super) fn launch(
    plan: Option<Arc<BlasPlan>>,
    on: Queue<'_>,
    rows: Rows<'_>,
    operands: &Linear<'_>,
) -> Result<(), CudaError> {
    let library = on.gpu.cublaslt().map_err(Clone::clone)?;
    let plan = match plan {
        None if takes(operands) => library.plan(on, rows, operands)?,
        plan => plan,
    };
    let plan = plan.ok_or_else(|| shape("linear", format!("{operands:?} by the library")))?;
    let Linear { x, w, out, .. } = *operands;
    library.blas.run(&plan, on.stream, [w, x.slice, out.slice, library.workspace(on)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    #[test]
    fn a_library_nobody_asked_for_is_waited_for_before_its_opener_goes() {
        let ended = Arc::new(AtomicBool::new(false));
        let says = Arc::clone(&ended);
        let opening = Opening::by(move || {
            std::thread::sleep(Duration::from_millis(50));
            says.store(true, Ordering::SeqCst);
            Err(CudaError::NoLibrary { library: "libcublasLt", reason: "is a test".to_owned() })
        });
        drop(opening);
        assert!(ended.load(Ordering::SeqCst));
    }
}
