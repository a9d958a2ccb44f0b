//! Capturing steps into graphs: all kinds that are known when an engine is configured, others while steps
//! run.
//!
//! What a step enqueues is said elsewhere. Invariant: a graph does what its step would have enqueued.

use super::graphs::{self, Graphs, Kind, Made};
use super::launch::Launch;
use super::{Cuda, Memory};
use device::cuda::{CudaError, Graph, Stream};
use ops::mla;
use ops::mla::cuda::expand::later;

impl Cuda {
    /// Captures the body of every step there can be, with the draws where it only decodes.
    pub(super) fn capture(&self, memory: &mut Memory) -> Result<(), CudaError> {
        let mut graphs = Graphs::new();
        let (before, _) = self.context.memory()?;
        let mut nodes = 0;
        for kind in graphs::kinds(&memory.limits, self.near_rows(), self.sizes.expands()) {
            memory.bucket = kind.bucket;
            let (graph, kernels) = self.capture_body(memory, kind, &[])?;
            nodes += graph.nodes()?;
            graphs.insert(kind, graph, kernels);
        }
        let (after, _) = self.context.memory()?;
        graphs.took(graphs::gone(before, after, nodes));
        memory.graphs = graphs;
        self.plan_later(memory)
    }

    /// A graph that is made while steps run.
    pub(super) fn capture_later(
        &self,
        memory: &Memory,
        kind: Kind,
        passes: &[usize],
    ) -> Result<Made, CudaError> {
        let (before, _) = self.context.memory()?;
        let (graph, kernels) = self.capture_body(memory, kind, passes)?;
        graph.upload(&self.stream)?;
        let (after, _) = self.context.memory()?;
        let bytes = graphs::gone(before, after, graph.nodes()?);
        Ok(Made { graph, kernels, bytes })
    }

    /// A step's body, and the names of the kernels in it.
    fn capture_body(
        &self,
        memory: &Memory,
        kind: Kind,
        passes: &[usize],
    ) -> Result<(Graph, Vec<String>), CudaError> {
        let before = self.launches();
        let body = |_: &Stream| self.enqueue_body(memory, kind, passes);
        let graph = self.stream.capture(body)?;
        let launched = self.launches().into_iter().filter(|now| !before.contains(now));
        Ok((graph, launched.map(|(name, _)| name).collect()))
    }

    /// Makes known how products over contexts are computed, for which steps would have to wait.
    fn plan_later(&self, memory: &Memory) -> Result<(), CudaError> {
        let of = self.body.iter().find_map(|launch| match launch {
            Launch::Block { block, .. } => Some(block),
            _ => None,
        });
        let room = self.sizes.expanded(&memory.limits).map(|(_, room)| room);
        let (Some(block), Some(room), Some(scratch)) = (of, room, &memory.scratch.expanded) else {
            return Ok(());
        };
        let (shape, kv_b) = (&block.shape, &block.weights.kv_b);
        let plan = |_: &Stream| {
            let mut all = later::paddings(room).into_iter();
            all.try_for_each(|tokens| later::plan(self.queue(), shape, kv_b, scratch, tokens))
        };
        self.stream.capture(plan).map(drop)
    }

    /// Rows of steps whose contexts may be near: none where a block's results lie in the place of what
    /// another part of the same launch still reads.
    pub(super) fn near_rows(&self) -> usize {
        let mut most = 0;
        for launch in &self.body {
            if let Launch::Block { block, .. } = launch {
                if !block.out.is_apart(block.q) || !block.out.is_apart(block.kv) {
                    return 0;
                }
                most = mla::cuda::near::MOST_ROWS;
            }
        }
        most
    }
}
