//! The part of a tensor that one rank keeps: rows, and columns within them.
//!
//! It reads nothing. Invariant: a part lies inside of its tensor.

use core::ops::Range;

/// Rows and columns of a tensor `[rows, ...]`, columns counted over all dimensions but the first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Name in the checkpoint.
    pub name: String,
    /// Dimensions of the whole tensor, outermost first.
    pub shape: Vec<usize>,
    rows: Range<usize>,
    cols: Range<usize>,
}

impl Part {
    /// Rows and columns of a matrix; of a vector the rows are its elements and there is one column.
    ///
    /// # Panics
    /// When they are not in the tensor.
    #[must_use]
    pub fn new(name: String, shape: Vec<usize>, rows: Range<usize>, cols: Range<usize>) -> Self {
        let part = Self { name, rows, cols, shape };
        let inside = |range: &Range<usize>, of| range.start <= range.end && range.end <= of;
        let (of_rows, of_cols) = (part.shape.first().copied().unwrap_or(1), part.width());
        assert!(inside(&part.rows, of_rows) && inside(&part.cols, of_cols), "{part:?}");
        part
    }

    /// All of a tensor.
    #[must_use]
    pub fn whole(name: &str, shape: &[usize]) -> Self {
        let mut part =
            Self { name: name.to_owned(), shape: shape.to_vec(), rows: 0..0, cols: 0..0 };
        part.rows = 0..shape.first().copied().unwrap_or(1);
        part.cols = 0..part.width();
        part
    }

    /// Rows kept.
    #[must_use]
    pub fn rows(&self) -> Range<usize> {
        self.rows.clone()
    }

    /// Columns kept.
    #[must_use]
    pub fn cols(&self) -> Range<usize> {
        self.cols.clone()
    }

    /// Elements of a whole row.
    pub(crate) fn width(&self) -> usize {
        self.shape.iter().skip(1).product()
    }

    /// Elements kept.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.rows.len() * self.cols.len()
    }

    /// Elements of the tensor that lie behind each other, if those kept do.
    pub(crate) fn stretch(&self) -> Option<Range<usize>> {
        let width = self.width();
        (self.cols == (0..width)).then(|| self.rows.start * width..self.rows.end * width)
    }

    /// Shape of what is kept.
    pub(crate) fn kept(&self) -> Vec<usize> {
        match self.shape.as_slice() {
            [] => Vec::new(),
            [_] => vec![self.rows.len()],
            [_, rest @ ..] if self.cols.len() == self.width() => {
                core::iter::once(self.rows.len()).chain(rest.iter().copied()).collect()
            }
            _ => vec![self.rows.len(), self.cols.len()],
        }
    }

    /// `out`, which holds the part, in pieces of up to `most` elements that lie behind each other in the
    /// tensor too, each with the number of its first element there.
    pub(crate) fn pieces<'a, T>(&self, most: usize, out: &'a mut [T]) -> Vec<(usize, &'a mut [T])> {
        let (first, width, len) = match self.stretch() {
            Some(all) => (all.start, all.len(), all.len()),
            None => {
                let width = self.width();
                (self.rows.start * width + self.cols.start, width, self.cols.len())
            }
        };
        let rows = out.chunks_mut(len.max(1)).enumerate();
        let pieces = rows.flat_map(|(row, out)| {
            let pieces = out.chunks_mut(most).enumerate();
            pieces.map(move |(piece, out)| (first + row * width + piece * most, out))
        });
        pieces.collect()
    }
}
