//! Which device serves, and why: decided once, before anything is allocated.
//!
//! Invariant: a device that was asked for is used or refused, never replaced; one that is there and
//! does not work is an error even where nobody asked for it.

use anyhow::{Context, Result};
use clap::ValueEnum;
use engine::{CudaDevice, CudaError, cuda_device};
use std::fmt;

/// The device used where there are several: the driver's first, which `CUDA_VISIBLE_DEVICES` chooses.
const FIRST: usize = 0;

/// What a user can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DeviceArg {
    /// A CUDA device where there is one that this build has kernels for, else the processor.
    Auto,
    /// The processor.
    Cpu,
    /// A CUDA device.
    Cuda,
}

/// The device that serves.
#[derive(Clone, Debug)]
pub(crate) struct Chosen {
    /// The processor where there is none.
    pub(crate) cuda: Option<CudaDevice>,
    /// For people.
    pub(crate) why: String,
}

impl Chosen {
    /// `cpu` or `cuda`.
    pub(crate) const fn name(&self) -> &'static str {
        if self.cuda.is_some() { "cuda" } else { "cpu" }
    }
}

impl fmt::Display for Chosen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.cuda {
            Some(device) => write!(f, "cuda:{} ({}): {}", device.ordinal, device.name, self.why),
            None => write!(f, "cpu: {}", self.why),
        }
    }
}

/// Chooses.
///
/// # Errors
/// When a CUDA device is asked for and there is none, or one is there and does not work.
pub(crate) fn choose(asked: DeviceArg) -> Result<Chosen> {
    let cpu = |why| Chosen { cuda: None, why };
    if asked == DeviceArg::Cpu {
        return Ok(cpu("asked for with --device cpu".to_owned()));
    }
    match (cuda_device(FIRST), asked) {
        (Ok(device), DeviceArg::Auto) => {
            Ok(Chosen { cuda: Some(device), why: "found, and this build has its kernels".into() })
        }
        (Ok(device), _) => {
            Ok(Chosen { cuda: Some(device), why: "asked for with --device cuda".into() })
        }
        (Err(error), DeviceArg::Auto) if is_absent(&error) => Ok(cpu(error.to_string())),
        (Err(error), DeviceArg::Auto) => {
            Err(error).context("use the CUDA device that is here; --device cpu serves without it")
        }
        (Err(error), _) => Err(error).context("--device cuda"),
    }
}

/// Whether an error says that there is nothing to use.
pub(crate) const fn is_absent(error: &CudaError) -> bool {
    matches!(error, CudaError::NoDriver | CudaError::NoDevice { .. } | CudaError::NoKernels { .. })
}
