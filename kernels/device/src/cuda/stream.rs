//! Streams, events and the copies that go through them.

use super::driver::check;
use super::{Context, CudaError, DeviceSlice, Graph, PinnedBuffer};
use cudarc::driver::sys::{
    self, CUevent, CUgraph, CUresult, CUstream, CUstreamCaptureMode, CUstreamCaptureStatus,
};
use std::sync::atomic::{AtomicU64, Ordering};

/// Which of the streams that work at the same time a stream is: what kernels of several streams write
/// beside their operands is one for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// The one that there always is.
    Main,
    /// Work beside it.
    Beside,
}

impl Lane {
    /// How many there are.
    pub const COUNT: usize = 2;
}

/// An order of work on the device.
#[derive(Debug)]
pub struct Stream {
    raw: CUstream,
    lane: Lane,
    context: Context,
    launched: AtomicU64,
    /// Which of them is made to fail; 0 is none.
    fails: AtomicU64,
}

// SAFETY: stream handles may be used from any thread; the driver locks them.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// A stream that does not wait for the default one.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn new(context: &Context) -> Result<Self, CudaError> {
        Self::on(context, Lane::Main)
    }

    /// A stream of a lane. Kernels that share scratch of their lane must not run at the same time on two
    /// streams of it.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn on(context: &Context, lane: Lane) -> Result<Self, CudaError> {
        let mut raw = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the pointer is to a live handle.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&raw mut raw, flags) })?;
        Ok(Self {
            raw,
            lane,
            context: context.clone(),
            launched: AtomicU64::new(0),
            fails: AtomicU64::new(0),
        })
    }

    /// Its lane.
    #[must_use]
    pub const fn lane(&self) -> Lane {
        self.lane
    }

    /// Kernels, graphs and copies enqueued or captured so far; events are not counted.
    #[must_use]
    pub fn launched(&self) -> u64 {
        self.launched.load(Ordering::Relaxed)
    }

    /// Makes the `n`-th of them from now on fail as if the driver had refused it: for tests of what
    /// happens then.
    pub fn plant_failure(&self, n: u64) {
        self.fails.store(self.launched().saturating_add(n), Ordering::Relaxed);
    }

    /// Counts one of them; a planted failure where it is the one.
    pub(super) fn count(&self) -> CUresult {
        let number = self.launched.fetch_add(1, Ordering::Relaxed) + 1;
        match number == self.fails.load(Ordering::Relaxed) {
            true => CUresult::CUDA_ERROR_LAUNCH_FAILED,
            false => CUresult::CUDA_SUCCESS,
        }
    }

    /// The context it belongs to.
    #[must_use]
    pub const fn context(&self) -> &Context {
        &self.context
    }

    pub(super) const fn raw(&self) -> CUstream {
        self.raw
    }

    /// Waits for what was enqueued.
    ///
    /// # Errors
    /// When any of it failed.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        // SAFETY: the handle is alive.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.raw) })
    }

    /// What is enqueued from now on runs after `event`.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn wait(&self, event: &Event) -> Result<(), CudaError> {
        // SAFETY: both handles are alive; 0 is the default flag.
        check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(self.raw, event.raw, 0) })
    }

    /// Copies `from[..to.bytes()]` to the device, and waits.
    ///
    /// # Errors
    /// When `from` is shorter than `to`, or anything enqueued before failed.
    pub fn upload(&self, from: &[u8], to: &DeviceSlice) -> Result<(), CudaError> {
        // SAFETY: the source is borrowed until the end of the wait below.
        unsafe { self.enqueue_upload(from, to)? };
        self.synchronize()
    }

    /// Enqueues a copy of the first `to.bytes()` bytes of pinned memory; the call does not wait.
    ///
    /// # Safety
    /// `from` is neither written nor dropped until the copy is over (an event behind it says so);
    /// captured into a graph, as long as the graph is launched.
    ///
    /// # Errors
    /// When `from` is shorter than `to`, or the driver refuses.
    pub unsafe fn upload_pinned(
        &self,
        from: &PinnedBuffer,
        to: &DeviceSlice,
    ) -> Result<(), CudaError> {
        // SAFETY: the caller leaves the source alone.
        unsafe { self.enqueue_upload(from.bytes(), to) }
    }

    /// # Safety
    /// `from` stays as it is until the copy is over.
    unsafe fn enqueue_upload(&self, from: &[u8], to: &DeviceSlice) -> Result<(), CudaError> {
        let (needed, got) = (to.bytes(), from.len());
        if got < needed {
            return Err(CudaError::Operand { op: "upload", what: "source", needed, got });
        }
        if needed == 0 {
            return Ok(());
        }
        check("cuMemcpyHtoDAsync", self.count())?;
        // SAFETY: both ranges have `needed` bytes; the caller leaves the source alone.
        let got = unsafe {
            sys::cuMemcpyHtoDAsync_v2(to.address(), from.as_ptr().cast(), needed, self.raw)
        };
        check("cuMemcpyHtoDAsync", got)
    }

    /// Enqueues a copy of all of `from` into pinned memory.
    ///
    /// # Safety
    /// `to` is neither touched nor dropped until the copy is over; captured into a graph, as long as
    /// the graph is launched.
    ///
    /// # Errors
    /// When `to` is shorter than `from`, or the driver refuses.
    pub unsafe fn download(
        &self,
        from: &DeviceSlice,
        to: &mut PinnedBuffer,
    ) -> Result<(), CudaError> {
        let (needed, got) = (from.bytes(), to.bytes().len());
        if got < needed {
            return Err(CudaError::Operand { op: "download", what: "target", needed, got });
        }
        if needed == 0 {
            return Ok(());
        }
        check("cuMemcpyDtoHAsync", self.count())?;
        // SAFETY: both ranges have `needed` bytes; the caller leaves the target alone.
        let got = unsafe {
            let target = to.bytes_mut().as_mut_ptr().cast();
            sys::cuMemcpyDtoHAsync_v2(target, from.address(), needed, self.raw)
        };
        check("cuMemcpyDtoHAsync", got)
    }

    /// Copies all of `from` to the host, and waits.
    ///
    /// # Errors
    /// When `to` is shorter than `from`, or anything enqueued before failed.
    pub fn read(&self, from: &DeviceSlice, to: &mut [u8]) -> Result<(), CudaError> {
        let (needed, got) = (from.bytes(), to.len());
        if got < needed {
            return Err(CudaError::Operand { op: "read", what: "target", needed, got });
        }
        if needed > 0 {
            // SAFETY: both ranges have `needed` bytes, and the target is borrowed until the end of
            // the wait below.
            let got = unsafe {
                let target = to.as_mut_ptr().cast();
                sys::cuMemcpyDtoHAsync_v2(target, from.address(), needed, self.raw)
            };
            check("cuMemcpyDtoHAsync", got)?;
        }
        self.synchronize()
    }

    /// Enqueues a copy inside the device.
    ///
    /// # Errors
    /// When the lengths differ, or the driver refuses.
    pub fn copy(&self, from: &DeviceSlice, to: &DeviceSlice) -> Result<(), CudaError> {
        let (needed, got) = (to.bytes(), from.bytes());
        if got != needed {
            return Err(CudaError::Operand { op: "copy", what: "source", needed, got });
        }
        if needed == 0 {
            return Ok(());
        }
        check("cuMemcpyDtoDAsync", self.count())?;
        // SAFETY: both ranges have `needed` bytes inside live allocations.
        let got =
            unsafe { sys::cuMemcpyDtoDAsync_v2(to.address(), from.address(), needed, self.raw) };
        check("cuMemcpyDtoDAsync", got)
    }

    /// Enqueues filling with a byte.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn fill(&self, slice: &DeviceSlice, byte: u8) -> Result<(), CudaError> {
        if slice.bytes() == 0 {
            return Ok(());
        }
        check("cuMemsetD8Async", self.count())?;
        // SAFETY: the range lies in a live allocation.
        let got = unsafe { sys::cuMemsetD8Async(slice.address(), byte, slice.bytes(), self.raw) };
        check("cuMemsetD8Async", got)
    }

    /// Records what `work` enqueues on this stream instead of running it, and makes it launchable.
    ///
    /// What the stream holds already goes on: nothing here waits for it or stops it. The mode is that of the
    /// thread: other threads may use other streams and allocate meanwhile, while a call of this one that
    /// could not be recorded (a wait, a query, an allocation) fails and spoils the capture instead of doing
    /// something else than a launch of the graph would; see [`Self::beside_capture`].
    ///
    /// # Errors
    /// `work`'s own, or when what it enqueued cannot be captured.
    pub fn capture<E: From<CudaError>>(
        &self,
        work: impl FnOnce(&Self) -> Result<(), E>,
    ) -> Result<Graph, E> {
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the handle is alive.
        let begun = unsafe { sys::cuStreamBeginCapture_v2(self.raw, mode) };
        check("cuStreamBeginCapture", begun)?;
        let outcome = work(self);
        let mut graph: CUgraph = std::ptr::null_mut();
        // SAFETY: the capture was begun on this stream; the pointer is to a live handle.
        let ended = unsafe { sys::cuStreamEndCapture(self.raw, &raw mut graph) };
        // The work's own error says more than that of the capture it spoiled.
        let graph = Graph::adopt(&self.context, graph);
        outcome?;
        check("cuStreamEndCapture", ended)?;
        Ok(graph.instantiate()?)
    }

    /// Whether work is recorded instead of run.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn is_capturing(&self) -> Result<bool, CudaError> {
        let mut status = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: the handle is alive, the pointer is to a live value.
        let got = unsafe { sys::cuStreamIsCapturing(self.raw, &raw mut status) };
        check("cuStreamIsCapturing", got)?;
        Ok(status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// Lets `work` use this stream, and wait for it, while the thread captures another one.
    ///
    /// # Errors
    /// `work`'s own, or when the driver refuses.
    pub fn beside_capture<T>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, CudaError>,
    ) -> Result<T, CudaError> {
        let mut mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the pointer is to a live value, which becomes the mode there was.
        let set = unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) };
        check("cuThreadExchangeStreamCaptureMode", set)?;
        let outcome = work(self);
        // SAFETY: as above.
        let set = unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) };
        check("cuThreadExchangeStreamCaptureMode", set)?;
        outcome
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: created in `new`, destroyed once; the driver finishes what is enqueued.
            unsafe { sys::cuStreamDestroy_v2(self.raw) };
        }
    }
}

/// A point in a stream.
#[derive(Debug)]
pub struct Event {
    raw: CUevent,
    context: Context,
}

// SAFETY: event handles may be used from any thread; the driver locks them.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// An event; `timed` ones can measure.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn new(context: &Context, timed: bool) -> Result<Self, CudaError> {
        let mut raw = std::ptr::null_mut();
        let flags = match timed {
            true => sys::CUevent_flags::CU_EVENT_DEFAULT,
            false => sys::CUevent_flags::CU_EVENT_DISABLE_TIMING,
        };
        // SAFETY: the pointer is to a live handle.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&raw mut raw, flags as u32) })?;
        Ok(Self { raw, context: context.clone() })
    }

    /// Enqueues the event.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn record(&self, stream: &Stream) -> Result<(), CudaError> {
        // SAFETY: both handles are alive.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.raw, stream.raw) })
    }

    /// Whether the stream has passed it.
    ///
    /// # Errors
    /// When what ran before failed.
    pub fn passed(&self) -> Result<bool, CudaError> {
        // SAFETY: the handle is alive.
        match unsafe { sys::cuEventQuery(self.raw) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => check("cuEventQuery", result).map(|()| true),
        }
    }

    /// Waits until the stream has passed it.
    ///
    /// # Errors
    /// When what ran before failed.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        // SAFETY: the handle is alive.
        check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.raw) })
    }

    /// Microseconds from an earlier timed event; both have passed.
    ///
    /// # Errors
    /// When either has not passed or is not timed.
    pub fn micros_since(&self, earlier: &Self) -> Result<f32, CudaError> {
        let mut millis = 0.0;
        // SAFETY: both handles are alive, the pointer is to a live float.
        let got = unsafe { sys::cuEventElapsedTime_v2(&raw mut millis, earlier.raw, self.raw) };
        check("cuEventElapsedTime", got)?;
        Ok(millis * 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: created in `new`, destroyed once.
            unsafe { sys::cuEventDestroy_v2(self.raw) };
        }
    }
}
