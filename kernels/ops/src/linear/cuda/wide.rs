//! Products whose time is the reading of weights: what their kernels share with the host.
//!
//! Tensor maps are made on the host with every launch, which asks the device for nothing. Invariant:
//! shapes here are those of the kernels in `linear_wide.cu` and `moe_wide.cu`.

use device::cuda::{CudaError, DeviceSlice, Parameters, Swizzle, TensorMap};

/// Elements of a line of 128 bytes, along the inputs.
pub(crate) const LINE: usize = 64;
/// Shared memory of a block that stages share, in bytes.
const MEMORY: usize = 226 * 1024;
/// Most stages.
const MOST_STAGES: usize = 24;
/// Barriers of a stage, in bytes.
const BARRIERS: usize = 16;

/// Mirrors `wide::Shape`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Warpgroups that compute.
    pub(crate) groups: usize,
    /// Times 64 outputs of a warpgroup.
    pub(crate) slabs: usize,
    /// Rows of a tile.
    pub(crate) rows: usize,
    /// Rows of a box.
    pub(crate) row_box: usize,
    /// Boxes along the inputs of a stage.
    pub(crate) boxes: usize,
}

impl Shape {
    /// Outputs of a tile.
    pub(crate) const fn outputs(self) -> usize {
        64 * self.groups * self.slabs
    }

    /// Threads of a block: the warpgroups and the producer's warp.
    pub(crate) const fn threads(self) -> u32 {
        (128 * self.groups + 32) as u32
    }

    /// Shared memory of a block, in bytes.
    pub(crate) const fn shared(self) -> u32 {
        let stage = self.boxes * (self.outputs() + self.rows) * 2 * LINE;
        let fit = MEMORY / stage;
        let stages = if fit < MOST_STAGES { fit } else { MOST_STAGES };
        (stages * (stage + BARRIERS)) as u32
    }

    /// Rows of `x`: `[rows, inputs]`, `stride` elements apart.
    pub(crate) fn x_map(
        self,
        x: &DeviceSlice,
        rows: usize,
        inputs: usize,
        stride: usize,
    ) -> Result<TensorMap, CudaError> {
        let boxes = [LINE as u32, self.row_box as u32];
        let dims = [inputs as u64, rows as u64];
        TensorMap::bf16_strided(x, dims, [1, stride as u64], boxes, Swizzle::Bytes128)
    }

    /// Weights `[batch, outputs, inputs]`.
    pub(crate) fn w_map(
        self,
        w: &DeviceSlice,
        batch: usize,
        outputs: usize,
        inputs: usize,
    ) -> Result<TensorMap, CudaError> {
        let boxes = [LINE as u32, self.outputs() as u32, 1];
        let dims = [inputs as u64, outputs as u64, batch as u64];
        TensorMap::bf16(w, dims, boxes, Swizzle::Bytes128)
    }

    /// Weights `[batch, 2, outputs, inputs]`, eight outputs of the first half, the same of the second,
    /// and so on; `outputs` is a multiple of 8.
    pub(crate) fn pairs_map(
        self,
        w: &DeviceSlice,
        batch: usize,
        outputs: usize,
        inputs: usize,
    ) -> Result<TensorMap, CudaError> {
        let boxes = [LINE as u32, 8, 2, (self.outputs() / 16) as u32, 1];
        let [n, k] = [outputs as u64, inputs as u64];
        let dims = [k, 8, 2, n / 8, batch as u64];
        let strides = [1, k, n * k, 8 * k, 2 * n * k];
        TensorMap::bf16_strided(w, dims, strides, boxes, Swizzle::Bytes128)
    }
}

/// Mirrors `wide::Params`.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(crate) struct Params {
    pub(crate) w: TensorMap,
    pub(crate) x: TensorMap,
    pub(crate) bias: u64,
    pub(crate) out: u64,
    pub(crate) partial: u64,
    pub(crate) flags: u64,
    pub(crate) count: u64,
    pub(crate) tiles: u64,
    pub(crate) out_stride: u64,
    pub(crate) rows: u32,
    pub(crate) outputs: u32,
    pub(crate) inputs: u32,
    pub(crate) pad: u32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked where it is filled in.
unsafe impl Parameters for Params {}
