//! Executes step plans on one rank of a mesh: slots, batches, the CPU and CUDA backends, the sampler.
//!
//! A library for a plain thread: no async, no network. The way of a step: `slots` applies the
//! plan's ops, `batch` turns runs into rows and segments, an [`Executor`] runs the flat op list and
//! draws where it can, `sampler` draws the rest; `steps` keeps what is on its way. Invariants: a plan that
//! contradicts the state is an error by name, never a panic; what is sampled for a request depends neither on
//! its batch nor on how it was chunked.

mod batch;
mod copies;
mod cpu;
mod cuda;
mod engine;
mod error;
mod executor;
mod flight;
mod kernels;
mod memory;
mod options;
mod parts;
mod phases;
mod sampler;
mod slots;
mod source;
mod standing;
mod steps;
mod tables;

pub use batch::{Batch, Purpose, Run, Wanted};
pub use copies::{BlockCopy, Way};
pub use cuda::{
    Captured, CudaBytes, CudaDevice, GRAPH_BYTES, cuda_attention, cuda_bytes, cuda_device,
};
/// What ranks exchange; an engine of several ranks is made with an end of it.
pub use device::collectives;
pub use device::cuda::CudaError;
pub use device::nvml::{GpuFigures, Nvml, NvmlError, Throttle};
pub use engine::Engine;
pub use error::{EngineError, PlanError, StepError, WeightError};
pub use executor::{Collected, DeviceTime, Executor, ExecutorError, TableView};
pub use kernels::kernel;
pub use memory::{HEAD_ROWS, penalty_bytes, step_bytes};
pub use options::{Device, KvDtype, MlaForm, Options};
pub use parts::parts;
pub use source::{Origin, WeightSource};

/// The instruction set that ops use on this processor: `avx512`, `avx2` or `scalar`.
#[must_use]
pub fn cpu_isa() -> &'static str {
    device::Isa::detect().name()
}
