//! Pinned memory that copies go through, safe to reuse: whoever wants to touch it waits for the copy.
//!
//! Invariant: host code never sees the bytes while the device reads or writes them.

use super::{Context, CudaError, DeviceSlice, Event, PinnedBuffer, Stream};

/// Bytes on their way to the device.
#[derive(Debug)]
pub struct Upload {
    buffer: PinnedBuffer,
    sent: Event,
    in_flight: bool,
}

impl Upload {
    /// Room for `bytes`.
    ///
    /// # Errors
    /// When the driver gives no memory.
    pub fn new(context: &Context, bytes: usize) -> Result<Self, CudaError> {
        let buffer = PinnedBuffer::zeros(context, bytes)?;
        Ok(Self { buffer, sent: Event::new(context, false)?, in_flight: false })
    }

    /// The bytes, to write; waits for a copy that still reads them.
    ///
    /// # Errors
    /// When anything enqueued before that copy failed.
    pub fn edit(&mut self) -> Result<&mut [u8], CudaError> {
        if self.in_flight {
            self.sent.synchronize()?;
            self.in_flight = false;
        }
        Ok(self.buffer.bytes_mut())
    }

    /// Enqueues a copy of the first `to.bytes()` bytes.
    ///
    /// # Errors
    /// When there are fewer, or the driver refuses.
    pub fn send(&mut self, stream: &Stream, to: &DeviceSlice) -> Result<(), CudaError> {
        // Set first: a copy that began and an event that failed must still be waited for.
        self.in_flight = true;
        // SAFETY: the buffer is private, and `edit` and `drop` wait for the event behind the copy.
        unsafe { stream.upload_pinned(&self.buffer, to)? };
        self.sent.record(stream)
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if self.in_flight && self.buffer.context().enter().is_ok() {
            // A failure means that the copy will not run any more.
            let _ = self.sent.synchronize();
        }
    }
}

/// Bytes on their way from the device.
#[derive(Debug)]
pub struct Download {
    buffer: PinnedBuffer,
    arrived: Event,
    in_flight: bool,
}

impl Download {
    /// Room for `bytes`.
    ///
    /// # Errors
    /// When the driver gives no memory.
    pub fn new(context: &Context, bytes: usize) -> Result<Self, CudaError> {
        let buffer = PinnedBuffer::zeros(context, bytes)?;
        Ok(Self { buffer, arrived: Event::new(context, false)?, in_flight: false })
    }

    /// Enqueues a copy of all of `from` to the front of the buffer.
    ///
    /// # Errors
    /// When `from` is longer, or the driver refuses.
    pub fn start(&mut self, stream: &Stream, from: &DeviceSlice) -> Result<(), CudaError> {
        self.in_flight = true;
        // SAFETY: the buffer is private, and `wait` and `drop` wait for the event behind the copy.
        unsafe { stream.download(from, &mut self.buffer)? };
        self.arrived.record(stream)
    }

    /// Whether no copy is under way.
    ///
    /// # Errors
    /// When anything enqueued before that copy failed.
    pub fn arrived(&self) -> Result<bool, CudaError> {
        if self.in_flight { self.arrived.passed() } else { Ok(true) }
    }

    /// The bytes; waits for a copy under way.
    ///
    /// # Errors
    /// When anything enqueued before that copy failed.
    pub fn wait(&mut self) -> Result<&mut [u8], CudaError> {
        if self.in_flight {
            self.arrived.synchronize()?;
            self.in_flight = false;
        }
        Ok(self.buffer.bytes_mut())
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        if self.in_flight && self.buffer.context().enter().is_ok() {
            // A failure means that the copy will not run any more.
            let _ = self.arrived.synchronize();
        }
    }
}
