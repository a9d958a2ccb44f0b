//! Device memory: one allocation, slices that keep it alive, an arena that cuts it; pinned host
//! memory for staging.
//!
//! A slice is an address with a length; taking one or cutting one up costs a reference count and no
//! call of the driver. Invariant: no slice reaches outside of its allocation.

use super::driver::check;
use super::{Context, CudaError};
use cudarc::driver::sys::{self, CUdeviceptr};
use std::ops::Range;
use std::sync::Arc;

/// Alignment of what an arena gives: a 128-byte line, twice over for tensor maps and L2 sectors.
const ALIGN: usize = 256;

/// One allocation, freed with its last slice.
#[derive(Debug)]
pub struct DeviceMemory {
    start: CUdeviceptr,
    bytes: usize,
    /// Allocations end before their context does.
    context: Context,
}

impl DeviceMemory {
    /// Allocates; the content is whatever was there.
    ///
    /// # Errors
    /// When memory does not suffice.
    pub fn allocate(context: &Context, what: &str, bytes: usize) -> Result<DeviceSlice, CudaError> {
        let mut start = 0;
        // SAFETY: the pointer is to a live integer. The driver refuses size 0, so it is not asked.
        let got = unsafe { sys::cuMemAlloc_v2(&raw mut start, bytes.max(1)) };
        if got == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            let left = context.memory().map_or(0, |(free, _)| free);
            return Err(CudaError::Memory { what: what.to_owned(), needed: bytes, left });
        }
        check("cuMemAlloc", got)?;
        let memory = Self { start, bytes, context: context.clone() };
        Ok(DeviceSlice { memory: Arc::new(memory), offset: 0, bytes })
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // The last slice may go on a thread that never used the device.
        if self.context.enter().is_ok() {
            // SAFETY: allocated in `allocate`, freed once; the call waits for work that uses it.
            unsafe { sys::cuMemFree_v2(self.start) };
        }
    }
}

/// Some bytes of an allocation.
#[derive(Clone, Debug)]
pub struct DeviceSlice {
    memory: Arc<DeviceMemory>,
    offset: usize,
    bytes: usize,
}

impl DeviceSlice {
    /// The address, as kernels take it.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.memory.start + self.offset as u64
    }

    /// Bytes.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// A part, by bytes.
    ///
    /// # Panics
    /// When the range is out of bounds.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Self {
        let Range { start, end } = range;
        assert!(start <= end && end <= self.bytes, "{start}..{end} of {} bytes", self.bytes);
        assert!(self.offset + end <= self.memory.bytes, "a slice inside its memory");
        Self { memory: Arc::clone(&self.memory), offset: self.offset + start, bytes: end - start }
    }
}

/// Cuts one allocation into slices, front to back.
#[derive(Debug)]
pub struct Arena {
    whole: DeviceSlice,
    used: usize,
}

impl Arena {
    /// Over all of `memory`.
    #[must_use]
    pub const fn new(memory: DeviceSlice) -> Self {
        Self { whole: memory, used: 0 }
    }

    /// Bytes that `bytes` take in an arena; for plans.
    #[must_use]
    pub const fn padded(bytes: usize) -> usize {
        bytes.next_multiple_of(ALIGN)
    }

    /// The next bytes, aligned to 256.
    ///
    /// # Errors
    /// When the arena is used up.
    pub fn take(&mut self, what: &str, bytes: usize) -> Result<DeviceSlice, CudaError> {
        let left = self.left();
        if bytes > left {
            return Err(CudaError::Memory { what: what.to_owned(), needed: bytes, left });
        }
        let slice = self.whole.slice(self.used..self.used + bytes);
        // Padding at the very end may not fit any more; then nothing does.
        self.used = (self.used + bytes).next_multiple_of(ALIGN).min(self.whole.bytes);
        Ok(slice)
    }

    /// Bytes left.
    #[must_use]
    pub const fn left(&self) -> usize {
        self.whole.bytes - self.used
    }
}

/// Host memory that the device copies from and to without a detour.
#[derive(Debug)]
pub struct PinnedBuffer {
    start: *mut u8,
    bytes: usize,
    context: Context,
}

// SAFETY: plain memory with one owner.
unsafe impl Send for PinnedBuffer {}

impl PinnedBuffer {
    /// `bytes` zeros.
    ///
    /// # Errors
    /// When the driver gives none.
    pub fn zeros(context: &Context, bytes: usize) -> Result<Self, CudaError> {
        let mut start = std::ptr::null_mut();
        // SAFETY: the pointer is to a live pointer; size 0 is not asked for.
        let got = unsafe { sys::cuMemHostAlloc(&raw mut start, bytes.max(1), 0) };
        check("cuMemHostAlloc", got)?;
        let start = start.cast::<u8>();
        // SAFETY: the driver gave at least that many bytes.
        unsafe { start.write_bytes(0, bytes.max(1)) };
        Ok(Self { start, bytes, context: context.clone() })
    }

    pub(super) const fn context(&self) -> &Context {
        &self.context
    }

    /// The first byte, for copies that no reference stands beside.
    pub(super) const fn start(&self) -> *mut u8 {
        self.start
    }

    /// How many bytes.
    pub(super) const fn len(&self) -> usize {
        self.bytes
    }

    /// The bytes, to read.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: initialised in `zeros` and owned. Copies into it are started by `Stream::download`,
        // whose contract keeps readers away until the copy is over.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }
    }

    /// The bytes, to write.
    #[must_use]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: allocated in `zeros`, freed once; the call waits for copies that use it.
            unsafe { sys::cuMemFreeHost(self.start.cast()) };
        }
    }
}
