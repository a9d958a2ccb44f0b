//! Memory that the pieces of a parallel loop share: an output that each fills its own part of, and
//! scratch of which each has one piece for a while.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, Ordering};

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

/// Threads that can hold scratch at once; more wait.
const MAX_PIECES: usize = 256;

/// Scratch cut into equal pieces, one per thread; an item of a loop takes a free one for its time.
pub(crate) struct PerThread<'a> {
    memory: Shared<'a, f32>,
    len: usize,
    taken: [AtomicBool; MAX_PIECES],
    count: usize,
}

impl<'a> PerThread<'a> {
    /// As many pieces of `len` elements as `scratch` holds.
    pub(crate) fn new(scratch: &'a mut [f32], len: usize) -> Self {
        let count = scratch.len().checked_div(len).unwrap_or(0).min(MAX_PIECES);
        let taken = [const { AtomicBool::new(false) }; MAX_PIECES];
        Self { memory: Shared::new(scratch), len, taken, count }
    }

    /// Runs `work` with a piece that nobody else has. Its content is whatever was left there.
    ///
    /// # Panics
    /// When there is no piece at all.
    pub(crate) fn with(&self, work: impl FnOnce(&mut [f32])) {
        assert!(self.count > 0, "scratch for at least one piece of {} elements", self.len);
        loop {
            for (index, taken) in self.taken[..self.count].iter().enumerate() {
                if !taken.swap(true, Ordering::Acquire) {
                    // SAFETY: the flag makes this thread the only holder of piece `index`.
                    work(unsafe { self.memory.part(index * self.len, self.len) });
                    taken.store(false, Ordering::Release);
                    return;
                }
            }
            std::hint::spin_loop();
        }
    }
}
