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
        const SIZE: u64 = 2;
        let refused = |why: String| CudaError::Shape { op: OP, why };
        let elements = dims.iter().try_fold(1_u64, |all, dim| all.checked_mul(*dim));
        let elements = elements.ok_or_else(|| refused(format!("{dims:?}")))?;
        let needed = usize::try_from(elements.saturating_mul(SIZE)).unwrap_or(usize::MAX);
        if needed > slice.bytes() {
            let got = slice.bytes();
            return Err(CudaError::Operand { op: OP, what: "memory", needed, got });
        }
        // From one index of a dimension to the next, in bytes; the innermost is dense.
        let mut strides = [0_u64; N];
        let mut stride = SIZE;
        for (to, dim) in strides.iter_mut().zip(dims) {
            stride *= dim;
            *to = stride;
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
                strides.as_ptr(),
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
