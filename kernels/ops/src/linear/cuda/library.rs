//! Products by cuBLASLt, for so many rows that arithmetic bounds them.
//!
//! The library is opened when the program comes to the device. Where it is not found the kernels here
//! compute everything, and [`Gpu::library`](crate::cuda::Gpu::library) says so. Products with a bias,
//! several side by side, and those of rows of which only some are real (the library computes all) stay
//! with the kernels here. A shape is planned when it is first asked for, which is when graphs are
//! captured. Invariant: which of the two computes a product depends on its shape alone.

use super::{Linear, Then, WIDE};
use crate::cuda::{Dtype, Queue, Rows, shape};
use device::cuda::{Blas, BlasPlan, Context, CudaError, DeviceMemory, DeviceSlice, Lane, Product};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// The library, memory for it, and what it planned.
#[derive(Debug)]
pub struct Library {
    blas: Blas,
    /// One for each lane of streams.
    workspaces: [DeviceSlice; Lane::COUNT],
    /// `None` where the library has no way.
    plans: Mutex<BTreeMap<Product, Option<Arc<BlasPlan>>>>,
}

impl Library {
    /// Bytes that products of one lane may use beside their operands.
    pub(crate) const WORKSPACE: usize = 32 << 20;

    /// Opens it.
    pub(crate) fn open(context: &Context) -> Result<Self, CudaError> {
        let blas = Blas::open(context)?;
        let what = "the library's workspace";
        let workspace = || DeviceMemory::allocate(context, what, Self::WORKSPACE);
        Ok(Self { blas, workspaces: [workspace()?, workspace()?], plans: Mutex::default() })
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

    fn plan(&self, product: Product) -> Result<Option<Arc<BlasPlan>>, CudaError> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = plans.get(&product) {
            return Ok(plan.clone());
        }
        let plan = self.blas.plan(product, Self::WORKSPACE)?.map(Arc::new);
        plans.insert(product, plan.clone());
        Ok(plan)
    }
}

/// Rows above which the library was measured to be faster, and above which it was for products of the
/// shape that [`faster`] describes.
pub(super) const ROWS: usize = 64;
const SOME_ROWS: usize = 32;
/// Rows up to which two products in one launch are faster than the library's two.
pub(super) const PAIR_ROWS: usize = 128;
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
    match on.gpu.library() {
        Ok(library) if faster(rows.padded, outputs, inputs) && takes(operands) => {
            library.plan(product(rows, operands))
        }
        _ => Ok(None),
    }
}

fn product(rows: Rows<'_>, operands: &Linear<'_>) -> Product {
    let Linear { x_stride, out, out_stride, inputs, outputs, .. } = *operands;
    let exact = out.dtype == Dtype::F32;
    Product { rows: rows.padded, outputs, inputs, x_stride, out_stride, exact }
}

/// The product as planned, or as it is planned now; lengths are checked against the plan.
pub(super) fn launch(
    plan: Option<Arc<BlasPlan>>,
    on: Queue<'_>,
    rows: Rows<'_>,
    operands: &Linear<'_>,
) -> Result<(), CudaError> {
    let library = on.gpu.library().map_err(Clone::clone)?;
    let plan = match plan {
        None if takes(operands) => library.plan(product(rows, operands))?,
        plan => plan,
    };
    let plan = plan.ok_or_else(|| shape("linear", format!("{operands:?} by the library")))?;
    let workspace = &library.workspaces[on.stream.lane() as usize];
    let Linear { x, w, out, .. } = *operands;
    library.blas.run(&plan, on.stream, [w, x.slice, out.slice, workspace])
}
