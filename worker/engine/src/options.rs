//! What an operator chooses about an engine.

use ids::Bytes;

/// What executes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Device {
    /// The processor.
    #[default]
    Cpu,
    /// A CUDA device, as the driver counts them.
    Cuda {
        /// From 0 on.
        ordinal: usize,
    },
}

/// Storage type of the cache; on a CUDA device that of activations and matrices too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum KvDtype {
    /// 32-bit floats: as exact as the activations.
    #[default]
    F32,
    /// bfloat16: half the memory.
    Bf16,
}

impl KvDtype {
    /// Bytes of an element.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// Which form of latent attention runs; both are right for any length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum MlaForm {
    /// By the length of the segment.
    #[default]
    Auto,
    /// Queries into the latent space.
    Absorbed,
    /// Latents out into keys and values.
    Expanded,
}

/// Options of an engine.
#[derive(Clone, Debug)]
pub struct Options {
    /// What executes.
    pub device: Device,
    /// Threads that execute ops on the CPU.
    pub threads: usize,
    /// Storage of the cache.
    pub kv_dtype: KvDtype,
    /// Bytes offered for the cache.
    pub cache_bytes: Bytes,
    /// Bytes of host memory offered behind it.
    pub host_bytes: Bytes,
    /// Whether a CUDA device captures its launches into graphs when it is configured: steps start
    /// sooner, the start takes longer.
    pub graphs: bool,
    /// Form of latent attention; only tests and measurements fix it.
    pub mla_form: MlaForm,
    /// Which launch of a CUDA device's steps is made to fail, from 1 on; only tests of what happens
    /// then plant one.
    pub failing_launch: Option<u64>,
}
