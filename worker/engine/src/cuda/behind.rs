//! The host's memory behind the cache, and the copies of blocks on the steps' stream.
//!
//! Nothing waits for a copy: it runs behind the steps enqueued before it and in front of those after it,
//! which is the order of the plans. Invariant: a block is copied whole, bit by bit.

use crate::copies::{BlockCopy, Way};
use device::cuda::{Context, CudaError, DeviceSlice, HostStore, Stream};
use ops::cuda::Dtype;

/// Blocks that the device has no room for.
pub(super) struct Behind {
    store: Option<HostStore>,
    /// Bytes of an element.
    element: usize,
}

impl Behind {
    /// Room for so many bytes, pinned.
    pub(super) fn new(context: &Context, bytes: u64, dtype: Dtype) -> Result<Self, CudaError> {
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        let store = (bytes > 0).then(|| HostStore::new(context, bytes)).transpose()?;
        Ok(Self { store, element: dtype.size() })
    }

    /// Enqueues copies, in order.
    pub(super) fn copy(
        &mut self,
        stream: &Stream,
        cache: &DeviceSlice,
        copies: &[BlockCopy],
    ) -> Result<(), CudaError> {
        let Some(store) = &mut self.store else {
            let why = "there is no memory behind the cache".to_owned();
            return Err(CudaError::Shape { op: "copy of blocks", why });
        };
        for copy in copies {
            let from = copy.cache * self.element;
            let block = cache.slice(from..from + copy.len * self.element);
            let at = copy.host * self.element;
            match copy.way {
                Way::Store => store.store(stream, &block, at)?,
                Way::Load => store.load(stream, at, &block)?,
            }
        }
        Ok(())
    }
}
