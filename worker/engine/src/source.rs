//! Where an engine's weights come from.
//!
//! It copies nothing but vectors that are not stored in 32-bit floats. Invariant: what it hands
//! out has the shape that was asked for.

use crate::WeightError;
use ops::{Matrix, WeightSlice};
use std::borrow::Cow;
use weights::{Slice, Weights};

/// Named weights with the lifetime of their storage.
pub trait WeightSource {
    /// A matrix `[rows, cols]`, in the type it is stored in.
    ///
    /// # Errors
    /// When it is absent or of another shape.
    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix<'_>, WeightError>;

    /// A vector `[len]` in 32-bit floats.
    ///
    /// # Errors
    /// As for matrices.
    fn vector(&self, name: &str, len: usize) -> Result<Cow<'_, [f32]>, WeightError>;
}

impl WeightSource for Weights {
    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix<'_>, WeightError> {
        let data = match shaped(self, name, &[rows, cols])? {
            Slice::F32(data) => WeightSlice::F32(data),
            Slice::Bf16(data) => WeightSlice::Bf16(data),
            Slice::F16(data) => WeightSlice::F16(data),
        };
        Ok(Matrix::new(data, rows, cols))
    }

    fn vector(&self, name: &str, len: usize) -> Result<Cow<'_, [f32]>, WeightError> {
        Ok(match shaped(self, name, &[len])? {
            Slice::F32(data) => Cow::Borrowed(data),
            other => Cow::Owned(other.to_f32()),
        })
    }
}

fn shaped<'a>(
    weights: &'a Weights,
    name: &str,
    wanted: &[usize],
) -> Result<Slice<'a>, WeightError> {
    let name = || name.to_owned();
    let weight = weights.get(&name()).ok_or_else(|| WeightError::Absent { name: name() })?;
    if weight.shape == wanted {
        return Ok(weight.data);
    }
    let (got, wanted) = (weight.shape.to_vec(), wanted.to_vec());
    Err(WeightError::Shape { name: name(), got, wanted })
}
