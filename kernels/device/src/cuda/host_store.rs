//! Pinned memory that parts of a device's memory are kept in while the device has no room for them.
//!
//! The host never looks into it: copies in either direction are enqueued on one stream, whose order is
//! the order in which a place is written, read and overwritten, so nobody waits for any of them.
//! Invariant: no copy reaches outside of it, and it is freed when the last is over.

use super::driver::check;
use super::{Context, CudaError, DeviceSlice, Event, PinnedBuffer, Stream};
use cudarc::driver::sys;

/// Memory of the host that copies go to and come back from.
#[derive(Debug)]
pub struct HostStore {
    buffer: PinnedBuffer,
    /// Behind the newest copy; passed where there was none.
    done: Event,
}

impl HostStore {
    /// Room for `bytes`.
    ///
    /// # Errors
    /// When the system does not let so much memory be pinned.
    pub fn new(context: &Context, bytes: usize) -> Result<Self, CudaError> {
        let done = Event::new(context, false)?;
        PinnedBuffer::zeros(context, bytes).map(|buffer| Self { buffer, done })
    }

    /// Enqueues a copy of all of `from` to the bytes from `at` on. All copies go through the same stream.
    ///
    /// # Errors
    /// When it would reach past the end, or the driver refuses.
    pub fn store(
        &mut self,
        stream: &Stream,
        from: &DeviceSlice,
        at: usize,
    ) -> Result<(), CudaError> {
        let to = self.place("store", at, from.bytes())?;
        check("cuMemcpyDtoHAsync", stream.count())?;
        // SAFETY: `place` checked the range; nobody on the host has a reference to any of it, and it is
        // not freed before the event below.
        let got = unsafe {
            sys::cuMemcpyDtoHAsync_v2(to.cast(), from.address(), from.bytes(), stream.raw())
        };
        check("cuMemcpyDtoHAsync", got)?;
        self.done.record(stream)
    }

    /// Enqueues a copy of the bytes from `at` on to all of `to`. All copies go through the same stream.
    ///
    /// # Errors
    /// As [`HostStore::store`].
    pub fn load(&mut self, stream: &Stream, at: usize, to: &DeviceSlice) -> Result<(), CudaError> {
        let from = self.place("load", at, to.bytes())?;
        check("cuMemcpyHtoDAsync", stream.count())?;
        // SAFETY: as in `store`.
        let got = unsafe {
            let from = from.cast_const().cast();
            sys::cuMemcpyHtoDAsync_v2(to.address(), from, to.bytes(), stream.raw())
        };
        check("cuMemcpyHtoDAsync", got)?;
        self.done.record(stream)
    }

    /// Where the bytes from `at` on lie.
    fn place(&self, op: &'static str, at: usize, bytes: usize) -> Result<*mut u8, CudaError> {
        let got = self.buffer.len();
        match at.checked_add(bytes) {
            // SAFETY: inside the allocation.
            Some(needed) if needed <= got => Ok(unsafe { self.buffer.start().add(at) }),
            past => {
                let needed = past.unwrap_or(usize::MAX);
                Err(CudaError::Operand { op, what: "the host's memory", needed, got })
            }
        }
    }
}

impl Drop for HostStore {
    fn drop(&mut self) {
        // A failure means that no copy runs any more.
        let entered = self.buffer.context().enter();
        let _ = entered.and_then(|()| self.done.synchronize());
    }
}
