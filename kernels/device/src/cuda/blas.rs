//! Products of matrices by cuBLASLt, opened at run time; a machine may do without it.
//!
//! It plans a product once, by the library's own heuristics, and runs the plan any number of times: a
//! run allocates nothing, waits for nothing and can be captured. Where the library is not sure, a plan's
//! ways can be timed against each other first. Which products are worth it is for the caller to say.
//! Invariant: a plan is one kernel with one split of the sums, in an order that does not depend on timing, so
//! a row of the result has the same bits whatever the other rows hold.

use super::{Context, CudaError, DeviceSlice, Event, Stream};
use cudarc::cublaslt::sys::{
    self, cublasComputeType_t, cublasLtMatmulDescAttributes_t as Attribute,
    cublasLtMatmulHeuristicResult_t, cublasLtMatmulPreferenceAttributes_t as Wish, cublasStatus_t,
    cudaDataType,
};
use std::ffi::{CStr, c_void};
use std::mem::MaybeUninit;
use std::ptr::from_ref;

/// The major version whose calls are declared here.
const MAJOR: usize = 13;
/// Addresses and rows begin on so many bytes.
const ALIGN: usize = 16;
/// The library's number for a transposed operand; its declaration is another library's.
const TRANSPOSED: i32 = 1;
/// Ways of a plan.
const WAYS: usize = 5;
/// Of a bf16.
const SIZE: usize = 2;

/// The library on one device.
#[derive(Debug)]
pub struct Blas {
    handle: sys::cublasLtHandle_t,
    version: (usize, usize),
    context: Context,
}

// SAFETY: the library allows a handle to be used by several threads at once.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

impl Blas {
    /// Opens the library on a context that is current.
    ///
    /// # Errors
    /// When it is not there or of another version, or refuses.
    pub fn open(context: &Context) -> Result<Self, CudaError> {
        let none = |reason: String| CudaError::NoLibrary { library: "libcublasLt.so.13", reason };
        // SAFETY: opens a library by name; its initialisers are the vendor's own.
        if !unsafe { sys::is_culib_present() } {
            return Err(none("is not found".to_owned()));
        }
        // SAFETY: the library is there; the call takes nothing.
        let version = unsafe { sys::cublasLtGetVersion() };
        let version = (version / 10_000, version / 100 % 100);
        if version.0 != MAJOR {
            return Err(none(format!("is needed, and version {}.{} found", version.0, version.1)));
        }
        let mut handle = std::ptr::null_mut();
        // SAFETY: the pointer is to a live handle, the device's context is current.
        check("cublasLtCreate", unsafe { sys::cublasLtCreate(&raw mut handle) })?;
        Ok(Self { handle, version, context: context.clone() })
    }

    /// Major and minor version.
    #[must_use]
    pub const fn version(&self) -> (usize, usize) {
        self.version
    }

    /// How the library computes a product with up to `workspace` bytes beside the operands: the ways that
    /// it expects to be fastest, of which the first is chosen; `None` where it does not.
    ///
    /// # Errors
    /// When the library refuses the description.
    pub fn plan(&self, product: Product, workspace: usize) -> Result<Option<BlasPlan>, CudaError> {
        let Product { rows, outputs, inputs, x_stride, out_stride, exact } = product;
        let aligned = |elements: usize, size: usize| (elements * size).is_multiple_of(ALIGN);
        let out_size = if exact { 4 } else { SIZE };
        if !aligned(inputs, SIZE) || !aligned(x_stride, SIZE) || !aligned(out_stride, out_size) {
            return Ok(None);
        }
        // The library's matrices lie column by column: to it the weights are transposed, and the result
        // has a column for each row.
        let description = Description::new()?;
        description.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, TRANSPOSED)?;
        let bf16 = cudaDataType::CUDA_R_16BF;
        let out = if exact { cudaDataType::CUDA_R_32F } else { bf16 };
        let w = Layout::new(bf16, inputs, outputs, inputs)?;
        let x = Layout::new(bf16, inputs, rows, x_stride)?;
        let out = Layout::new(out, outputs, rows, out_stride)?;
        let wishes = Wishes::new()?;
        wishes.set(Wish::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace as u64)?;
        for wish in [
            Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            wishes.set(wish, ALIGN as u32)?;
        }
        let mut count = 0;
        let mut found = [const { MaybeUninit::<cublasLtMatmulHeuristicResult_t>::zeroed() }; WAYS];
        // SAFETY: all handles are alive; the library writes at most so many results, and how many.
        let got = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                description.0,
                w.0,
                x.0,
                out.0,
                out.0,
                wishes.0,
                WAYS as i32,
                found.as_mut_ptr().cast(),
                &raw mut count,
            )
        };
        if got == cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED || (count == 0 && is_success(got)) {
            return Ok(None);
        }
        check("cublasLtMatmulAlgoGetHeuristic", got)?;
        let found = found.iter().take(usize::try_from(count).unwrap_or(0));
        // SAFETY: the call succeeded and wrote so many results.
        let found = found.map(|result| unsafe { result.assume_init() });
        let ways: Vec<Way> = found
            .filter(|result| is_success(result.state))
            .map(|result| Way { algorithm: result.algo, workspace: result.workspaceSize })
            .collect();
        let plan = BlasPlan { product, description, w, x, out, ways, chosen: 0 };
        Ok((!plan.ways.is_empty()).then_some(plan))
    }

    /// Runs every way of a plan on an idle stream, and chooses the one that was fastest; the first one if
    /// hardly any slower. The result is written, whatever the operands hold.
    ///
    /// # Errors
    /// As [`Blas::run`].
    pub fn choose(
        &self,
        plan: &mut BlasPlan,
        stream: &Stream,
        operands: [&DeviceSlice; 4],
    ) -> Result<(), CudaError> {
        const RUNS: usize = 2;
        /// Of the first one's time: what a measurement may be wrong by.
        const ENOUGH: f32 = 0.98;
        /// What a way with a workspace takes beside its time here, in microseconds: it clears some of that
        /// first, and in a graph both launches wait for the one in front to end.
        const CLEARS: f32 = 4.0;
        let ends = [Event::new(&self.context, true)?, Event::new(&self.context, true)?];
        let mut least = f32::INFINITY;
        let mut chosen = 0;
        for way in 0..plan.ways.len() {
            plan.chosen = way;
            self.run(plan, stream, operands)?;
            ends[0].record(stream)?;
            for _ in 0..RUNS {
                self.run(plan, stream, operands)?;
            }
            ends[1].record(stream)?;
            ends[1].synchronize()?;
            let clears = if plan.ways[way].workspace > 0 { CLEARS * RUNS as f32 } else { 0.0 };
            let took = ends[1].micros_since(&ends[0])? + clears;
            if took < least {
                least = if way == 0 { took * ENOUGH } else { took };
                chosen = way;
            }
        }
        plan.chosen = chosen;
        Ok(())
    }

    /// Enqueues `out = x w^T`: `w` is `[outputs, inputs]`, `x` `[rows, inputs]`, of bf16. Products that
    /// share a workspace run one after the other.
    ///
    /// # Errors
    /// When an operand is too short or begins on no multiple of 16 bytes, or the library refuses.
    pub fn run(
        &self,
        plan: &BlasPlan,
        stream: &Stream,
        [w, x, out, workspace]: [&DeviceSlice; 4],
    ) -> Result<(), CudaError> {
        const OP: &str = "product";
        let Product { rows, outputs, inputs, x_stride, out_stride, exact } = plan.product;
        let matrix = |rows: usize, stride: usize, width: usize, size: usize| {
            let before = rows.checked_sub(1).map_or(Some(0), |rows| rows.checked_mul(stride));
            let all = before.and_then(|before| before.checked_add(width)?.checked_mul(size));
            all.unwrap_or(usize::MAX)
        };
        let out_size = if exact { 4 } else { SIZE };
        for (what, slice, needed) in [
            ("w", w, matrix(outputs, inputs, inputs, SIZE)),
            ("x", x, matrix(rows, x_stride, inputs, SIZE)),
            ("out", out, matrix(rows, out_stride, outputs, out_size)),
            ("workspace", workspace, plan.ways[plan.chosen].workspace),
        ] {
            let got = slice.bytes();
            if got < needed {
                return Err(CudaError::Operand { op: OP, what, needed, got });
            }
            if !slice.address().is_multiple_of(ALIGN as u64) {
                let why = format!("{what} at {:#x}", slice.address());
                return Err(CudaError::Shape { op: OP, why });
            }
        }
        let way = &plan.ways[plan.chosen];
        let (one, zero) = (1.0_f32, 0.0_f32);
        let [w_at, x_at, out_at, workspace_at] =
            [w, x, out, workspace].map(|slice| slice.address() as *mut c_void);
        stream.count();
        // SAFETY: the handles are alive, the operands as long as the layouts say and aligned as was
        // promised; the two factors are read before the call returns.
        let got = unsafe {
            sys::cublasLtMatmul(
                self.handle,
                plan.description.0,
                from_ref(&one).cast(),
                w_at,
                plan.w.0,
                x_at,
                plan.x.0,
                from_ref(&zero).cast(),
                out_at,
                plan.out.0,
                out_at,
                plan.out.0,
                &raw const way.algorithm,
                workspace_at,
                workspace.bytes(),
                stream.raw().cast(),
            )
        };
        check("cublasLtMatmul", got)
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: created in `open`, destroyed once.
            unsafe { sys::cublasLtDestroy(self.handle) };
        }
    }
}

/// A product of bf16 matrices with sums in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Product {
    /// Of `x`.
    pub rows: usize,
    /// Width of a row of the result.
    pub outputs: usize,
    /// Width of a row of `x`.
    pub inputs: usize,
    /// From row to row of `x`, in elements.
    pub x_stride: usize,
    /// From row to row of the result, in elements.
    pub out_stride: usize,
    /// Whether the result is f32 instead of bf16.
    pub exact: bool,
}

impl Product {
    /// Additions and multiplications.
    #[must_use]
    pub const fn operations(&self) -> usize {
        self.rows.saturating_mul(self.outputs).saturating_mul(self.inputs).saturating_mul(2)
    }
}

/// How the library may compute one product, and which way it does.
#[derive(Debug)]
pub struct BlasPlan {
    product: Product,
    description: Description,
    w: Layout,
    x: Layout,
    out: Layout,
    /// At least one.
    ways: Vec<Way>,
    /// Of them.
    chosen: usize,
}

/// One of the library's kernels, with what it needs.
#[derive(Debug)]
struct Way {
    algorithm: sys::cublasLtMatmulAlgo_t,
    workspace: usize,
}

// SAFETY: the handles are plain descriptions, written when they are made and only read afterwards.
unsafe impl Send for BlasPlan {}
// SAFETY: as above.
unsafe impl Sync for BlasPlan {}

/// Of the arithmetic.
#[derive(Debug)]
struct Description(sys::cublasLtMatmulDesc_t);

impl Description {
    fn new() -> Result<Self, CudaError> {
        let mut raw = std::ptr::null_mut();
        let sums = cublasComputeType_t::CUBLAS_COMPUTE_32F;
        // SAFETY: the pointer is to a live handle.
        let made =
            unsafe { sys::cublasLtMatmulDescCreate(&raw mut raw, sums, cudaDataType::CUDA_R_32F) };
        check("cublasLtMatmulDescCreate", made)?;
        Ok(Self(raw))
    }

    fn set<T: Copy>(&self, which: Attribute, value: T) -> Result<(), CudaError> {
        let value = from_ref(&value).cast();
        // SAFETY: the handle is alive; the library copies as many bytes as the value has.
        let set =
            unsafe { sys::cublasLtMatmulDescSetAttribute(self.0, which, value, size_of::<T>()) };
        check("cublasLtMatmulDescSetAttribute", set)
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed once.
        unsafe { sys::cublasLtMatmulDescDestroy(self.0) };
    }
}

/// Of a matrix, column by column.
#[derive(Debug)]
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(
        of: cudaDataType,
        rows: usize,
        columns: usize,
        stride: usize,
    ) -> Result<Self, CudaError> {
        let mut raw = std::ptr::null_mut();
        let (rows, columns) = (rows as u64, columns as u64);
        let stride = i64::try_from(stride).unwrap_or(i64::MAX);
        // SAFETY: the pointer is to a live handle.
        let made =
            unsafe { sys::cublasLtMatrixLayoutCreate(&raw mut raw, of, rows, columns, stride) };
        check("cublasLtMatrixLayoutCreate", made)?;
        Ok(Self(raw))
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed once.
        unsafe { sys::cublasLtMatrixLayoutDestroy(self.0) };
    }
}

/// What a plan may use.
struct Wishes(sys::cublasLtMatmulPreference_t);

impl Wishes {
    fn new() -> Result<Self, CudaError> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: the pointer is to a live handle.
        let made = unsafe { sys::cublasLtMatmulPreferenceCreate(&raw mut raw) };
        check("cublasLtMatmulPreferenceCreate", made)?;
        Ok(Self(raw))
    }

    fn set<T: Copy>(&self, which: Wish, value: T) -> Result<(), CudaError> {
        let value = from_ref(&value).cast();
        // SAFETY: the handle is alive; the library copies as many bytes as the value has.
        let set = unsafe {
            sys::cublasLtMatmulPreferenceSetAttribute(self.0, which, value, size_of::<T>())
        };
        check("cublasLtMatmulPreferenceSetAttribute", set)
    }
}

impl Drop for Wishes {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed once.
        unsafe { sys::cublasLtMatmulPreferenceDestroy(self.0) };
    }
}

fn is_success(status: cublasStatus_t) -> bool {
    status == cublasStatus_t::CUBLAS_STATUS_SUCCESS
}

fn check(call: &'static str, status: cublasStatus_t) -> Result<(), CudaError> {
    if is_success(status) {
        return Ok(());
    }
    // SAFETY: the library is loaded, since it gave a status; it gives static, terminated text.
    let name = unsafe { CStr::from_ptr(sys::cublasLtGetStatusName(status)) };
    Err(CudaError::Call { call, code: name.to_string_lossy().into_owned() })
}
