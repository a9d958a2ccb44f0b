//! What tests on a device share: the device or a loud skip, data there and back, rounding to bf16.

pub(crate) mod paged;

use super::{Dtype, Gpu, Queue};
use device::cuda::{Context, CudaError, DeviceMemory, DeviceSlice, Stream};
use half::bf16;
use std::io::Write;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// Says once why tests on a device do nothing, past the test runner's capture.
pub(crate) fn skip(why: &str) {
    static SAID: OnceLock<()> = OnceLock::new();
    SAID.get_or_init(|| {
        let required = std::env::var("TOKENMILL_REQUIRE").unwrap_or_default();
        assert!(!required.split(',').any(|r| r == "gpu"), "a GPU is required: {why}");
        let _ = writeln!(std::io::stderr(), "SKIPPED: tests on a CUDA device: {why}");
    });
}

/// Whether tests that take long do a part of what they do: fewer rows and shorter ones, all kinds of them.
/// For tools under which a kernel takes a hundred times as long, and for kernels that sleep.
pub(crate) fn small() -> bool {
    std::env::var_os("TOKENMILL_TEST_SMALL").is_some()
}

/// A device with its kernels.
pub(crate) struct Device {
    pub(crate) gpu: Gpu,
    pub(crate) stream: Stream,
    pub(crate) context: Context,
}

/// The device, for one test at a time; `None` where there is none.
pub(crate) fn device() -> Option<MutexGuard<'static, Device>> {
    static DEVICE: OnceLock<Option<Mutex<Device>>> = OnceLock::new();
    let open = || {
        let context = Context::open(0)?;
        let (gpu, stream) = (Gpu::new(&context)?, Stream::new(&context)?);
        // Nobody drops the device of tests, so nobody else waits for the library before the process ends.
        let _ = gpu.cublaslt();
        Ok::<_, CudaError>(Mutex::new(Device { gpu, stream, context }))
    };
    // What is absent is skipped; what is there and fails is a failure.
    let found = DEVICE.get_or_init(|| match open() {
        Ok(device) => Some(device),
        Err(
            error
            @ (CudaError::NoDriver | CudaError::NoDevice { .. } | CudaError::NoKernels { .. }),
        ) => {
            skip(&error.to_string());
            None
        }
        Err(error) => panic!("the device cannot be used: {error}"),
    });
    let device = found.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner);
    device.context.enter().expect("a context that was opened");
    Some(device)
}

/// Values as the device sees them after rounding to `dtype`.
pub(crate) fn rounded(values: &[f32], dtype: Dtype) -> Vec<f32> {
    match dtype {
        Dtype::F32 => values.to_vec(),
        Dtype::Bf16 => values.iter().map(|x| bf16::from_f32(*x).to_f32()).collect(),
    }
}

/// Plain values that may be sent.
pub(crate) trait Plain: Copy {}
impl Plain for u32 {}
impl Plain for u64 {}
impl Plain for f32 {}
impl Plain for bf16 {}
impl Plain for crate::flash::cuda::Segment {}
impl Plain for crate::flash::cuda::Tile {}
impl Plain for crate::sample::cuda::SampleRow {}
impl Plain for crate::sample::cuda::TokenLogprob {}

impl Device {
    pub(crate) fn queue(&self) -> Queue<'_> {
        Queue { gpu: &self.gpu, stream: &self.stream }
    }

    /// Memory full of NaN, for results that must be written.
    pub(crate) fn poisoned(&self, bytes: usize) -> DeviceSlice {
        let slice = DeviceMemory::allocate(&self.context, "a test", bytes).expect("memory");
        self.stream.fill(&slice, 0xFF).expect("a fill");
        slice
    }

    pub(crate) fn send<T: Plain>(&self, values: &[T]) -> DeviceSlice {
        let slice = self.poisoned(size_of_val(values));
        // SAFETY: plain values without padding, read as bytes for the length of the call.
        let bytes = unsafe {
            std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values))
        };
        self.stream.upload(bytes, &slice).expect("an upload");
        slice
    }

    pub(crate) fn send_as(&self, values: &[f32], dtype: Dtype) -> DeviceSlice {
        match dtype {
            Dtype::F32 => self.send(values),
            Dtype::Bf16 => {
                self.send(&values.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>())
            }
        }
    }

    pub(crate) fn fetch<T: Plain>(&self, slice: &DeviceSlice, zero: T) -> Vec<T> {
        let mut values = vec![zero; slice.bytes() / size_of::<T>()];
        // SAFETY: plain values of which every bit pattern is one.
        let bytes = unsafe {
            std::slice::from_raw_parts_mut(values.as_mut_ptr().cast::<u8>(), slice.bytes())
        };
        self.stream.read(slice, bytes).expect("a download");
        values
    }

    pub(crate) fn fetch_as(&self, slice: &DeviceSlice, dtype: Dtype) -> Vec<f32> {
        match dtype {
            Dtype::F32 => self.fetch(slice, 0.0),
            Dtype::Bf16 => self.fetch(slice, bf16::ZERO).iter().map(|x| x.to_f32()).collect(),
        }
    }
}

/// Asserts that every element is within `tolerance` of what is expected, relative to its own size plus
/// that of a typical element, and NaN exactly where NaN is expected.
pub(crate) fn assert_near(what: &str, got: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let finite = || expected.iter().filter(|e| e.is_finite());
    let typical = (finite().map(|e| e * e).sum::<f64>() / finite().count().max(1) as f64).sqrt();
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        let g = f64::from(*g);
        assert_eq!(g.is_nan(), e.is_nan(), "{what}: element {i} is {g}, expected {e}");
        let allowed = tolerance * (e.abs() + typical);
        assert!(
            e.is_nan() || (g - e).abs() <= allowed,
            "{what}: element {i} is {g}, expected {e} within {allowed}"
        );
    }
}

/// One rounding of a result: half a unit in the last place (2^-8 of a number in bf16), with room for
/// the f32 sum before it.
pub(crate) const fn rounding(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => 1e-5,
        Dtype::Bf16 => 4e-3,
    }
}

/// Both types.
pub(crate) const DTYPES: [Dtype; 2] = [Dtype::F32, Dtype::Bf16];
