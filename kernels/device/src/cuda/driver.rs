//! Calls of the driver: loaded or refused once, results turned into errors.

use super::CudaError;
use cudarc::driver::sys::{self, CUresult};
use std::ffi::CStr;
use std::sync::OnceLock;

/// Loads and initialises the driver, once for the process.
pub(super) fn load() -> Result<(), CudaError> {
    static LOADED: OnceLock<Result<(), CudaError>> = OnceLock::new();
    LOADED
        .get_or_init(|| {
            // SAFETY: opens a library by name; its initialisers are the driver's own.
            if !unsafe { sys::is_culib_present() } {
                return Err(CudaError::NoDriver);
            }
            // SAFETY: the library is there; 0 is the only flag the call takes.
            match unsafe { sys::cuInit(0) } {
                CUresult::CUDA_ERROR_NO_DEVICE => Err(CudaError::NoDevice { ordinal: 0, count: 0 }),
                result => check("cuInit", result),
            }
        })
        .clone()
}

/// The driver's name of a result.
pub(super) fn code(result: CUresult) -> String {
    let mut text = std::ptr::null();
    // SAFETY: the driver is loaded, since it gave a result; it writes a pointer to static text.
    let named = unsafe { sys::cuGetErrorName(result, &raw mut text) };
    if named != CUresult::CUDA_SUCCESS || text.is_null() {
        return format!("code {}", result as u32);
    }
    // SAFETY: the driver gave a static, terminated string.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// An error that names the call.
pub(super) fn check(call: &'static str, result: CUresult) -> Result<(), CudaError> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    Err(CudaError::Call { call, code: code(result) })
}
