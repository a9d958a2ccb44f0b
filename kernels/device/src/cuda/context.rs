//! A device's primary context.

use super::CudaError;
use super::driver::{check, load};
use cudarc::driver::sys::{self, CUcontext, CUdevice, CUdevice_attribute as Attribute};
use std::sync::Arc;

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFacts {
    /// As the driver names it.
    pub name: String,
    /// Where it is plugged in, as `0000:1b:00.0`.
    pub pci: String,
    /// The newest CUDA that the driver serves, major and minor.
    pub driver: (u32, u32),
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of the second-level cache.
    pub l2_bytes: usize,
    /// Shared memory that one block may have, in bytes.
    pub shared_bytes: u32,
    /// Bytes of device memory.
    pub memory_bytes: usize,
}

/// A device in use; clones are the same context.
#[derive(Clone, Debug)]
pub struct Context {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    raw: CUcontext,
    device: CUdevice,
    facts: DeviceFacts,
}

// SAFETY: a context handle may be used from any thread; the driver locks it.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: retained in `open`, released once. A failure at this point changes nothing.
        unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

impl Context {
    /// Opens a device and makes it current on this thread.
    ///
    /// # Errors
    /// Without a driver, or without such a device.
    pub fn open(ordinal: usize) -> Result<Self, CudaError> {
        load()?;
        let mut count = 0;
        // SAFETY: the pointer is to a live integer.
        check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&raw mut count) })?;
        let count = usize::try_from(count).unwrap_or(0);
        let index = i32::try_from(ordinal).ok().filter(|_| ordinal < count);
        let Some(index) = index else { return Err(CudaError::NoDevice { ordinal, count }) };
        let mut device = 0;
        // SAFETY: as above; the ordinal is below the count.
        check("cuDeviceGet", unsafe { sys::cuDeviceGet(&raw mut device, index) })?;
        let facts = facts(device)?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the device comes from the driver, the pointer is to a live handle.
        let retained = unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut raw, device) };
        check("cuDevicePrimaryCtxRetain", retained)?;
        let context = Self { inner: Arc::new(Inner { raw, device, facts }) };
        context.enter()?;
        Ok(context)
    }

    /// Makes the context current on the calling thread. Every thread that uses it calls this once.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn enter(&self) -> Result<(), CudaError> {
        // SAFETY: the handle is alive as long as `inner` is.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.inner.raw) })
    }

    /// What the device is.
    #[must_use]
    pub fn facts(&self) -> &DeviceFacts {
        &self.inner.facts
    }

    /// Bytes free and in all.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn memory(&self) -> Result<(usize, usize), CudaError> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: both pointers are to live integers.
        let got = unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) };
        check("cuMemGetInfo", got)?;
        Ok((free, total))
    }

    /// Waits for everything.
    ///
    /// # Errors
    /// When anything that ran before failed.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        // SAFETY: no argument; acts on the current context.
        check("cuCtxSynchronize", unsafe { sys::cuCtxSynchronize() })
    }

    /// Enqueues `work` where a profiler looks that was told to begin when the program says so
    /// (`ncu --profile-from-start off`), and waits for it. Without a profiler it is just run.
    ///
    /// # Errors
    /// `work`'s own, or when the driver refuses.
    pub fn profiled<T, E: From<CudaError>>(
        &self,
        work: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        // SAFETY: no argument; acts on the current context.
        check("cuProfilerStart", unsafe { sys::cuProfilerStart() })?;
        let outcome = work();
        let ran = self.synchronize();
        // SAFETY: as above.
        let stopped = check("cuProfilerStop", unsafe { sys::cuProfilerStop() });
        let outcome = outcome?;
        ran.and(stopped)?;
        Ok(outcome)
    }
}

fn facts(device: CUdevice) -> Result<DeviceFacts, CudaError> {
    let attribute = |which: Attribute| -> Result<u32, CudaError> {
        let mut value = 0;
        // SAFETY: the pointer is to a live integer, the device comes from the driver.
        let got = unsafe { sys::cuDeviceGetAttribute(&raw mut value, which, device) };
        check("cuDeviceGetAttribute", got)?;
        Ok(u32::try_from(value).unwrap_or(0))
    };
    let mut name = [0_u8; 256];
    // SAFETY: the driver writes at most the given number of bytes, the last of them a zero.
    let named = unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast(), 256, device) };
    check("cuDeviceGetName", named)?;
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    let mut pci = [0_u8; 32];
    // SAFETY: as above.
    let placed = unsafe { sys::cuDeviceGetPCIBusId(pci.as_mut_ptr().cast(), 32, device) };
    check("cuDeviceGetPCIBusId", placed)?;
    let pci_end = pci.iter().position(|byte| *byte == 0).unwrap_or(pci.len());
    let mut memory_bytes = 0;
    // SAFETY: the pointer is to a live integer.
    let got = unsafe { sys::cuDeviceTotalMem_v2(&raw mut memory_bytes, device) };
    check("cuDeviceTotalMem", got)?;
    let mut driver = 0;
    // SAFETY: the pointer is to a live integer.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&raw mut driver) })?;
    let driver = u32::try_from(driver).unwrap_or(0);
    Ok(DeviceFacts {
        // Written as 1000 times the major, 10 times the minor.
        driver: (driver / 1000, driver % 1000 / 10),
        name: String::from_utf8_lossy(&name[..end]).into_owned(),
        pci: String::from_utf8_lossy(&pci[..pci_end]).into_owned(),
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
        shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        memory_bytes,
    })
}
