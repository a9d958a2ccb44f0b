//! One launch: a kernel, its shape, its parameter block.
//!
//! A kernel takes one block of plain data by value, mirrored by a `#[repr(C)]` struct here; the size
//! is compared on every launch with what the compiled kernel states. Clusters and programmatic
//! dependent launch are attributes.

use super::driver::code;
use super::{CudaError, Kernel, Stream};
use cudarc::driver::sys::{
    self, CUlaunchAttribute, CUlaunchAttributeID as Id, CUlaunchAttributeValue, CUlaunchConfig,
};
use std::fmt;

/// A parameter block.
///
/// # Safety
/// `#[repr(C)]`, of integers and floats without padding that matters, equal to the kernel's own
/// struct; every address in it is of device memory that holds what the kernel reads and writes.
pub unsafe trait Parameters: Copy {}

/// Grid, block, shared memory, cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaunchShape {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared: u32,
    /// Blocks of a cluster along x; 1 is none.
    pub cluster: u32,
}

impl fmt::Display for LaunchShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [x, y, z] = self.grid;
        let Self { block, shared, cluster, .. } = self;
        write!(f, "{x} x {y} x {z} blocks of {block} threads and {shared} bytes")?;
        if *cluster > 1 { write!(f, " in clusters of {cluster}") } else { Ok(()) }
    }
}

/// A launch being described.
#[derive(Clone, Copy, Debug)]
#[must_use = "nothing runs before `on`"]
pub struct Launch<'a> {
    kernel: &'a Kernel,
    shape: LaunchShape,
    dependent: bool,
}

impl<'a> Launch<'a> {
    /// `grid` blocks of `block` threads.
    pub const fn new(kernel: &'a Kernel, grid: [u32; 3], block: u32) -> Self {
        let shape = LaunchShape { grid, block, shared: 0, cluster: 1 };
        Self { kernel, shape, dependent: false }
    }

    /// With dynamic shared memory, in bytes per block.
    pub const fn shared(mut self, bytes: u32) -> Self {
        self.shape.shared = bytes;
        self
    }

    /// In clusters of `blocks` along x.
    pub const fn cluster(mut self, blocks: u32) -> Self {
        self.shape.cluster = blocks;
        self
    }

    /// May start before the launch in front of it ends; the kernel itself waits where it must.
    pub const fn dependent(mut self) -> Self {
        self.dependent = true;
        self
    }

    /// Enqueues it. A grid without blocks is nothing to do.
    ///
    /// # Errors
    /// When the parameter block is not the kernel's, or the driver refuses the launch.
    pub fn on<P: Parameters>(self, stream: &Stream, parameters: &P) -> Result<(), CudaError> {
        let Self { kernel, shape, dependent } = self;
        if size_of::<P>() != kernel.parameters {
            return Err(CudaError::Parameters {
                kernel: kernel.name().to_owned(),
                host: size_of::<P>(),
                device: kernel.parameters,
            });
        }
        if shape.grid.contains(&0) {
            return Ok(());
        }
        let none = CUlaunchAttribute {
            id: Id::CU_LAUNCH_ATTRIBUTE_IGNORE,
            pad: [0; 4],
            value: CUlaunchAttributeValue { pad: [0; 64] },
        };
        let mut attributes = [none; 2];
        let mut count = 0;
        if shape.cluster > 1 {
            let dims =
                sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: shape.cluster, y: 1, z: 1 };
            attributes[count].id = Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            attributes[count].value.clusterDim = dims;
            count += 1;
        }
        if dependent {
            attributes[count].id = Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attributes[count].value.programmaticStreamSerializationAllowed = 1;
            count += 1;
        }
        let config = CUlaunchConfig {
            gridDimX: shape.grid[0],
            gridDimY: shape.grid[1],
            gridDimZ: shape.grid[2],
            blockDimX: shape.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shape.shared,
            hStream: stream.raw(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: count as u32,
        };
        let mut list = [std::ptr::from_ref(parameters).cast_mut().cast()];
        kernel.count();
        let got = match stream.count() {
            // SAFETY: the configuration and its attributes live through the call; the kernel takes
            // one parameter of this very size, which the driver copies; what its addresses mean is
            // the promise of `Parameters`.
            sys::CUresult::CUDA_SUCCESS => unsafe {
                sys::cuLaunchKernelEx(
                    &raw const config,
                    kernel.raw,
                    list.as_mut_ptr(),
                    std::ptr::null_mut(),
                )
            },
            planted => planted,
        };
        if got == sys::CUresult::CUDA_SUCCESS {
            return Ok(());
        }
        Err(CudaError::Launch { kernel: kernel.name().to_owned(), shape, code: code(got) })
    }
}
