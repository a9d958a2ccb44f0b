//! Devices. The CPU: a pool of threads that a step can use without allocating, buffers with the
//! alignment that kernels want, and what the processor can do. CUDA: see [`cuda`], and
//! [`nvml`] for a device's state. What ranks exchange: see [`collectives`].
//!
//! No operation lives here and no model is known. Invariant: work given to the pool is over when
//! the call returns, also when a piece of it panics.

mod buffer;
pub mod collectives;
pub mod cuda;
mod isa;
pub mod nvml;
mod pool;

pub use buffer::AlignedVec;
pub use isa::Isa;
pub use pool::ThreadPool;
