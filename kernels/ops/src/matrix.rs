//! Weights as checkpoints hold them: row-major `[out, in]`, in one of three element types.

use half::{bf16, f16};

/// Elements of a weight, not copied from where they lie.
#[derive(Clone, Copy, Debug)]
pub enum WeightSlice<'a> {
    /// IEEE single.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [bf16]),
    /// IEEE half.
    F16(&'a [f16]),
}

impl<'a> WeightSlice<'a> {
    /// Elements.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(s) => s.len(),
            Self::Bf16(s) => s.len(),
            Self::F16(s) => s.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A part.
    ///
    /// # Panics
    /// When the range is out of bounds.
    #[must_use]
    pub fn range(&self, range: std::ops::Range<usize>) -> WeightSlice<'a> {
        match self {
            Self::F32(s) => Self::F32(&s[range]),
            Self::Bf16(s) => Self::Bf16(&s[range]),
            Self::F16(s) => Self::F16(&s[range]),
        }
    }

    /// One element as f32.
    #[must_use]
    pub fn get(&self, index: usize) -> f32 {
        match self {
            Self::F32(s) => s[index],
            Self::Bf16(s) => s[index].to_f32(),
            Self::F16(s) => s[index].to_f32(),
        }
    }

    /// Bytes of all elements.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match self {
            Self::F32(s) => size_of_val(*s),
            Self::Bf16(s) => size_of_val(*s),
            Self::F16(s) => size_of_val(*s),
        }
    }
}

/// A weight matrix; `rows` outputs of `cols` inputs each.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    /// Row-major elements.
    pub data: WeightSlice<'a>,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
}

impl<'a> Matrix<'a> {
    /// A matrix over `data`.
    ///
    /// # Panics
    /// When `data` does not hold `rows * cols` elements.
    #[must_use]
    pub fn new(data: WeightSlice<'a>, rows: usize, cols: usize) -> Self {
        assert_eq!(Some(data.len()), rows.checked_mul(cols), "a {rows} x {cols} matrix");
        Self { data, rows, cols }
    }

    /// The weights of one output.
    ///
    /// # Panics
    /// When there is no such row.
    #[must_use]
    pub fn row(&self, row: usize) -> WeightSlice<'a> {
        self.data.range(row * self.cols..(row + 1) * self.cols)
    }

    /// Consecutive outputs as a matrix.
    ///
    /// # Panics
    /// When the range is out of bounds.
    #[must_use]
    pub fn rows(&self, rows: std::ops::Range<usize>) -> Matrix<'a> {
        let data = self.data.range(rows.start * self.cols..rows.end * self.cols);
        Matrix { data, rows: rows.len(), cols: self.cols }
    }
}
