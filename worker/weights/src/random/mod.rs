//! Weights made of a seed and a name instead of read from a file.
//!
//! Two users: the parity tests, which fill the same tiny model here and in numpy, and whoever wants
//! to measure an engine on a published shape without its weights. They need other scales, hence
//! [`Profile`].
//!
//! **The numbers.** The normal distribution is the sum of eight uniform 16-bit integers, centred
//! and scaled to unit variance. It has the normal's first three moments; its fourth is 2.85 where
//! the normal's is 3, and it ends at 4.9 standard deviations, which weights do not miss. What it
//! has over Box-Muller or a ziggurat: until the last two operations everything is integer
//! arithmetic, which is the same on every CPU and GPU and in numpy, and those two are IEEE double
//! operations without a transcendental. So "the same weights" means the same bits.
//!
//! **Counter-based.** Element `i` depends on seed, tensor name and `i` only, so any thread, rank or
//! device fills any part of any tensor in any order. Routers under [`Profile::Realistic`] are the
//! exception: their rows are made orthogonal, so one is made whole.
//!
//! It does not know which tensors a model has. Invariant: equal arguments give equal bits.

mod fill;
mod generator;
mod law;
mod memory;
mod router;
mod source;

pub(crate) use fill::Fill;
pub use generator::Generator;
pub use law::{Law, Profile};
pub use source::{DrawnMatrix, Draws, RandomWeights};

use crate::header::byte_len;
use crate::set::Float;
use safetensors::Dtype;

/// A tensor to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name in the checkpoint.
    pub name: String,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Element type: F32, BF16 or F16.
    pub dtype: Dtype,
}

impl TensorSpec {
    /// Number of elements.
    ///
    /// # Errors
    /// [`RandomError::TooLarge`].
    pub fn elements(&self) -> Result<usize, RandomError> {
        let elements = self.shape.iter().try_fold(1usize, |all, &dim| all.checked_mul(dim));
        elements.ok_or_else(|| RandomError::TooLarge { tensor: self.name.clone() })
    }

    /// Number of bytes.
    ///
    /// # Errors
    /// [`RandomError::TooLarge`], and [`RandomError::Dtype`] for a type that is not made.
    pub fn byte_len(&self) -> Result<u64, RandomError> {
        self.float()?;
        self.elements()?;
        byte_len(self.dtype, &self.shape)
            .filter(|&bytes| isize::try_from(bytes).is_ok())
            .ok_or_else(|| RandomError::TooLarge { tensor: self.name.clone() })
    }

    pub(crate) fn float(&self) -> Result<Float, RandomError> {
        Float::of(self.dtype)
            .ok_or_else(|| RandomError::Dtype { tensor: self.name.clone(), dtype: self.dtype })
    }
}

/// What all tensors of a model share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RandomModel {
    /// Chooses the numbers.
    pub seed: u64,
    /// Chooses their scale.
    pub profile: Profile,
    /// Whether the embedding is the LM head too (`tie_word_embeddings`), which bounds its scale.
    pub tied_embeddings: bool,
}

/// A tensor that cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RandomError {
    /// No rule says how a tensor of this name is distributed.
    #[error(
        "no rule for random values of `{tensor}` of shape {shape:?}; random weights exist for \
         matrices, norms and biases"
    )]
    NoLaw {
        /// The tensor's name.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A type that random values are not made in.
    #[error("`{tensor}`: random values are made as F32, BF16 or F16, not {dtype:?}")]
    Dtype {
        /// The tensor's name.
        tensor: String,
        /// The type asked for.
        dtype: Dtype,
    },
    /// More elements than can be addressed.
    #[error("`{tensor}`: its dimensions multiply to more than this machine can address")]
    TooLarge {
        /// The tensor's name.
        tensor: String,
    },
}
