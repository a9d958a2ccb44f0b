//! Descriptions of tensors for the copy engine: shape, box and swizzle, made on the host, given to
//! kernels by value.
//!
//! It copies nothing. Invariant: a map covers no byte outside of the memory it was made for.

use super::driver::check;
use super::{CudaError, DeviceSlice};
use cudarc::driver::sys::{self, CUtensorMap};

const OP: &str = "tensor map";

/// How 16-byte units are permuted within a line of shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swizzle {
    /// As they lie.
    None,
    /// Within 128 bytes, by the number of the line.
    Bytes128,
}

/// A tensor map as kernels take it.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct TensorMap(CUtensorMap);

impl std::fmt::Debug for TensorMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TensorMap")
    }
}

impl TensorMap {
    /// A bf16 tensor of `dims` (innermost first, dense) over the beginning of `slice`, copied in boxes.
    ///
    /// # Errors
    /// When the slice is too short, or the driver refuses the shape.
    pub fn bf16<const N: usize>(
        slice: &DeviceSlice,
        dims: [u64; N],
        boxes: [u32; N],
        swizzle: Swizzle,
    ) -> Result<Self, CudaError> {
        let mut strides = [1_u64; N];
        for i in 1..N {
            strides[i] = strides[i - 1].saturating_mul(dims[i - 1]);
        }
        Self::bf16_strided(slice, dims, strides, boxes, swizzle)
    }

    /// As [`TensorMap::bf16`], with `strides` elements from one index of a dimension to the next; of
    /// the innermost it is 1. Dimensions may be in any order.
    ///
    /// # Errors
    /// As [`TensorMap::bf16`].
    pub fn bf16_strided<const N: usize>(
        slice: &DeviceSlice,
        dims: [u64; N],
        strides: [u64; N],
        boxes: [u32; N],
        swizzle: Swizzle,
    ) -> Result<Self, CudaError> {
        const SIZE: u64 = 2;
        let last = dims.iter().zip(&strides).try_fold(0_u64, |all, (dim, stride)| {
            dim.checked_sub(1)?.checked_mul(*stride)?.checked_add(all)
        });
        let needed = last.and_then(|last| last.checked_add(1)?.checked_mul(SIZE));
        let needed = needed
            .filter(|_| strides.first() == Some(&1))
            .ok_or_else(|| CudaError::Shape { op: OP, why: format!("{dims:?} by {strides:?}") })?;
        let needed = usize::try_from(needed).unwrap_or(usize::MAX);
        if needed > slice.bytes() {
            let got = slice.bytes();
            return Err(CudaError::Operand { op: OP, what: "memory", needed, got });
        }
        // The driver takes bytes, and none for the innermost; of N entries it reads N - 1.
        let mut bytes = [0_u64; N];
        for (to, stride) in bytes.iter_mut().zip(strides.iter().skip(1)) {
            *to = stride.saturating_mul(SIZE);
        }
        let swizzle = match swizzle {
            Swizzle::None => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
            Swizzle::Bytes128 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        };
        let steps = [1_u32; N];
        let mut map = CUtensorMap { opaque: [0; 16] };
        // SAFETY: the arrays have `N` entries and live through the call, which writes the map alone;
        // the memory behind the address is as long as the shape says.
        let got = unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                N as u32,
                slice.address() as *mut _,
                dims.as_ptr(),
                bytes.as_ptr(),
                boxes.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_NONE,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        check("cuTensorMapEncodeTiled", got)?;
        Ok(Self(map))
    }
}
