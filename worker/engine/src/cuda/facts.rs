//! What a plan must know of a device before an engine is made. Opens the device and leaves it again.

use device::cuda::{Context, CudaError};
use ids::Bytes;

/// A device that this program has kernels for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaDevice {
    /// As the driver counts.
    pub ordinal: usize,
    /// As the driver names it.
    pub name: String,
    /// Where it is plugged in, by which [`Nvml`](device::nvml::Nvml) finds it.
    pub pci: String,
    /// The newest CUDA that the driver serves, major and minor.
    pub driver: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: usize,
    /// Memory in all.
    pub total: Bytes,
    /// Memory that nobody holds, after a context took its own.
    pub free: Bytes,
}

/// Looks at a device.
///
/// # Errors
/// Without a driver, a device, or kernels that fit it; each says what to do.
pub fn cuda_device(ordinal: usize) -> Result<CudaDevice, CudaError> {
    let context = Context::open(ordinal)?;
    let facts = context.facts();
    ops::cuda::check(facts)?;
    let (free, total) = context.memory()?;
    Ok(CudaDevice {
        ordinal,
        name: facts.name.clone(),
        pci: facts.pci.clone(),
        driver: facts.driver,
        multiprocessors: facts.multiprocessors as usize,
        total: Bytes(total as u64),
        free: Bytes(free as u64),
    })
}
