//! CUDA: contexts, memory, streams, events, kernels, graphs, over the driver alone; products of matrices
//! over cuBLASLt where it is there.
//!
//! Either is loaded when it is opened; without them a program runs and says so. Nothing else here knows
//! an operation. Invariants: a step path allocates nothing (memory is cut from an arena
//! beforehand), a slice keeps its memory alive, and every failure names the call, and for a launch
//! the kernel and its shape.

mod blas;
mod context;
mod driver;
mod error;
mod graph;
mod host_store;
mod kernel;
mod launch;
mod memory;
mod staging;
mod stream;
mod tensor_map;

pub use blas::{Blas, BlasPlan, Product};
pub use context::{Context, DeviceFacts};
pub use error::CudaError;
pub use graph::Graph;
pub use host_store::HostStore;
pub use kernel::{Cubin, Kernel, Kernels};
pub use launch::{Launch, LaunchShape, Parameters};
pub use memory::{Arena, DeviceMemory, DeviceSlice, PinnedBuffer};
pub use staging::{Download, Upload};
pub use stream::{Event, Lane, Stream};
pub use tensor_map::{Swizzle, TensorMap};
