//! An output that several threads fill, each its own part.

use std::marker::PhantomData;

/// A mutable slice lent to the pieces of a parallel loop.
pub(crate) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    lent: PhantomData<&'a mut [T]>,
}

// SAFETY: the only access is `part`, whose contract keeps parts of different threads disjoint.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), lent: PhantomData }
    }

    /// `len` elements from `offset` on.
    ///
    /// # Safety
    /// While the returned slice lives no other part that overlaps it may be taken.
    ///
    /// # Panics
    /// When the part is out of bounds.
    #[allow(clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
    pub(crate) unsafe fn part(&self, offset: usize, len: usize) -> &mut [T] {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "part out of bounds");
        // SAFETY: in bounds by the assertion; exclusive by this function's contract; alive for
        // `'a`, which outlives the borrow of `self`.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(offset), len) }
    }
}
