//! What can fail, with what it was about and what to do.

use super::launch::LaunchShape;
use thiserror::Error;

/// A failure of the device or of how it was used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CudaError {
    /// No driver library.
    #[error(
        "libcuda.so.1 is not found: install an NVIDIA driver of version 580 or later, or run on the processor"
    )]
    NoDriver,
    /// No vendor's library of the version that is needed.
    #[error("{library} {reason}")]
    NoLibrary {
        /// Its file.
        library: &'static str,
        /// Whether it is absent or another one.
        reason: String,
    },
    /// No such device.
    #[error("CUDA device {ordinal} does not exist: the driver shows {count}")]
    NoDevice {
        /// Asked for.
        ordinal: usize,
        /// There are.
        count: usize,
    },
    /// A call of the driver failed.
    #[error("{call} failed with {code}")]
    Call {
        /// The driver's function.
        call: &'static str,
        /// The driver's name of the failure.
        code: String,
    },
    /// A kernel could not be launched.
    #[error("launching {kernel} as {shape} failed with {code}")]
    Launch {
        /// The kernel.
        kernel: String,
        /// Grid, block and shared memory.
        shape: LaunchShape,
        /// The driver's name of the failure.
        code: String,
    },
    /// The program was built without kernels.
    #[error("this program holds no CUDA kernels for the device: {reason}")]
    NoKernels {
        /// What was missing when it was built, and how to get it.
        reason: &'static str,
    },
    /// There are kernels, but not this one.
    #[error("no CUDA kernel is named {name}")]
    NoKernel {
        /// Looked up.
        name: String,
    },
    /// A parameter block has another size on the two sides.
    #[error("{kernel} takes {device} bytes of parameters, the host passes {host}")]
    Parameters {
        /// The kernel.
        kernel: String,
        /// Bytes on the host.
        host: usize,
        /// Bytes on the device.
        device: usize,
    },
    /// Memory of the device does not suffice.
    #[error("{what} needs {needed} bytes of device memory, {left} are left")]
    Memory {
        /// What it is for.
        what: String,
        /// Bytes asked for.
        needed: usize,
        /// Bytes free.
        left: usize,
    },
    /// A slice is too short for the shape it was given with.
    #[error("{what} of {op} needs {needed} bytes, the slice has {got}")]
    Operand {
        /// The operation.
        op: &'static str,
        /// The operand.
        what: &'static str,
        /// Bytes that the shape asks for.
        needed: usize,
        /// Bytes there are.
        got: usize,
    },
    /// A shape that an operation does not take.
    #[error("{op} does not take {why}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// What is wrong with it.
        why: String,
    },
}
