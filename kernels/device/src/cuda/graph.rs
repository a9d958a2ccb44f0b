//! Captured work that is launched as one.
//!
//! A graph holds addresses, not slices: whoever captures it keeps the memory alive, which in the
//! engine the arena does. Invariant: a graph given out can be launched.

use super::driver::check;
use super::{Context, CudaError, Stream};
use cudarc::driver::sys::{self, CUgraph, CUgraphExec};

/// Work recorded by [`Stream::capture`].
#[derive(Debug)]
pub struct Graph {
    graph: CUgraph,
    exec: CUgraphExec,
    context: Context,
}

// SAFETY: graph handles may move between threads; they are used by one at a time, see `launch`.
unsafe impl Send for Graph {}

impl Graph {
    /// Owns a captured graph; null where a capture failed.
    pub(super) fn adopt(context: &Context, graph: CUgraph) -> Self {
        Self { graph, exec: std::ptr::null_mut(), context: context.clone() }
    }

    pub(super) fn instantiate(mut self) -> Result<Self, CudaError> {
        // SAFETY: the graph comes from a capture that succeeded; 0 are the default flags.
        let made = unsafe { sys::cuGraphInstantiateWithFlags(&raw mut self.exec, self.graph, 0) };
        check("cuGraphInstantiate", made)?;
        Ok(self)
    }

    /// Sends it to the device, where that is not done when it was made or by its first launch, behind what the
    /// stream holds. Memory of the device that it needs beyond what instantiating took is taken here, and so
    /// that there is none is known now.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn upload(&self, stream: &Stream) -> Result<(), CudaError> {
        // SAFETY: both handles are alive; one thread uses the graph at a time, as in `launch`.
        check("cuGraphUpload", unsafe { sys::cuGraphUpload(self.exec, stream.raw()) })
    }

    /// Enqueues all of it. The memory that was captured must be alive, as for a kernel.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn launch(&self, stream: &Stream) -> Result<(), CudaError> {
        check("cuGraphLaunch", stream.count())?;
        // SAFETY: both handles are alive; `Graph` is not `Sync`, so one thread uses it at a time.
        check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(self.exec, stream.raw()) })
    }

    /// Launches and copies recorded.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn nodes(&self) -> Result<usize, CudaError> {
        let mut count = 0;
        // SAFETY: a null list asks for the count alone.
        let got = unsafe { sys::cuGraphGetNodes(self.graph, std::ptr::null_mut(), &raw mut count) };
        check("cuGraphGetNodes", got)?;
        Ok(count)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.context.enter().is_err() {
            return;
        }
        // SAFETY: each handle is null or owned, and destroyed once.
        unsafe {
            if !self.exec.is_null() {
                sys::cuGraphExecDestroy(self.exec);
            }
            if !self.graph.is_null() {
                sys::cuGraphDestroy(self.graph);
            }
        }
    }
}
