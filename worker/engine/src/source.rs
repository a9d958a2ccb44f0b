//! Where an engine's weights come from.
//!
//! It copies nothing but vectors that are not stored in 32-bit floats. Invariant: what it hands
//! out has the shape that was asked for.

use crate::WeightError;
use ops::{Matrix, WeightSlice};
use std::borrow::Cow;
use weights::random::{DrawnMatrix, Draws, RandomWeights};
use weights::{Slice, Stored, Weights};

/// Where a device gets the elements of a matrix.
#[derive(Clone, Debug)]
pub enum Origin<'a> {
    /// Out of memory.
    Held(WeightSlice<'a>),
    /// Out of a file.
    Stored(Stored),
    /// It makes them.
    Drawn(Draws),
}

/// Named weights with the lifetime of their storage.
pub trait WeightSource {
    /// A matrix `[rows, cols]`, in the type it is stored in.
    ///
    /// # Errors
    /// When it is absent, of another shape, or not in memory.
    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix<'_>, WeightError>;

    /// A vector `[len]` in 32-bit floats.
    ///
    /// # Errors
    /// As for matrices.
    fn vector(&self, name: &str, len: usize) -> Result<Cow<'_, [f32]>, WeightError>;

    /// As [`WeightSource::matrix`], for devices with memory of their own.
    ///
    /// # Errors
    /// When it is absent or of another shape.
    fn origin(&self, name: &str, rows: usize, cols: usize) -> Result<Origin<'_>, WeightError> {
        Ok(Origin::Held(self.matrix(name, rows, cols)?.data))
    }
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

    fn origin(&self, name: &str, rows: usize, cols: usize) -> Result<Origin<'_>, WeightError> {
        let held = self.matrix(name, rows, cols)?.data;
        Ok(self.stored(name).map_or(Origin::Held(held), Origin::Stored))
    }
}

impl WeightSource for RandomWeights {
    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix<'_>, WeightError> {
        match self.drawn(name) {
            Some(_) => Err(WeightError::NotMade { name: name.to_owned() }),
            None => self.made().matrix(name, rows, cols),
        }
    }

    fn vector(&self, name: &str, len: usize) -> Result<Cow<'_, [f32]>, WeightError> {
        self.made().vector(name, len)
    }

    fn origin(&self, name: &str, rows: usize, cols: usize) -> Result<Origin<'_>, WeightError> {
        match self.drawn(name) {
            Some(DrawnMatrix { shape, draws }) => {
                same_shape(name, shape, &[rows, cols])?;
                Ok(Origin::Drawn(*draws))
            }
            None => self.made().origin(name, rows, cols),
        }
    }
}

fn shaped<'a>(
    weights: &'a Weights,
    name: &str,
    wanted: &[usize],
) -> Result<Slice<'a>, WeightError> {
    let weight = weights.get(name).ok_or_else(|| WeightError::Absent { name: name.to_owned() })?;
    same_shape(name, weight.shape, wanted)?;
    Ok(weight.data)
}

fn same_shape(name: &str, got: &[usize], wanted: &[usize]) -> Result<(), WeightError> {
    if got == wanted {
        return Ok(());
    }
    let (got, wanted) = (got.to_vec(), wanted.to_vec());
    Err(WeightError::Shape { name: name.to_owned(), got, wanted })
}
