//! A vector whose first element lies on a cache line, so that vector loads never split one.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Bytes of a cache line and of the widest vector register.
const ALIGN: usize = 64;

/// Element types for which all-zero bytes are a value.
pub trait Zeroable: Copy + sealed::Sealed {}
impl Zeroable for f32 {}
impl Zeroable for half::bf16 {}
impl Zeroable for u32 {}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::bf16 {}
    impl Sealed for u32 {}
}

/// A fixed-length, zero-initialised, 64-byte aligned buffer.
pub struct AlignedVec<T: Zeroable> {
    start: NonNull<T>,
    len: usize,
    owns: PhantomData<T>,
}

impl<T: Zeroable> AlignedVec<T> {
    /// `len` zeros.
    ///
    /// # Panics
    /// When the size overflows or memory is exhausted, as `Vec` does.
    #[must_use]
    pub fn zeros(len: usize) -> Self {
        if len == 0 {
            return Self { start: NonNull::dangling(), len, owns: PhantomData };
        }
        let layout = Self::layout(len);
        // SAFETY: the layout's size is not zero, since `len` and the element size are not.
        let start = unsafe { alloc_zeroed(layout) }.cast::<T>();
        let start = NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout));
        Self { start, len, owns: PhantomData }
    }

    fn layout(len: usize) -> Layout {
        Layout::array::<T>(len)
            .and_then(|layout| layout.align_to(ALIGN))
            .expect("a buffer larger than the address space")
    }
}

impl<T: Zeroable> Drop for AlignedVec<T> {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: allocated in `zeros` with this very layout; `T: Copy` needs no drop.
            unsafe { dealloc(self.start.as_ptr().cast(), Self::layout(self.len)) };
        }
    }
}

impl<T: Zeroable> Deref for AlignedVec<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `start` points to `len` initialised elements that this value owns; for `len` 0
        // a dangling aligned pointer is what a slice wants.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T: Zeroable> DerefMut for AlignedVec<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

// SAFETY: the buffer is owned memory of plain values, with no interior sharing.
unsafe impl<T: Zeroable + Send> Send for AlignedVec<T> {}
// SAFETY: shared access only reads.
unsafe impl<T: Zeroable + Sync> Sync for AlignedVec<T> {}

impl<T: Zeroable> std::fmt::Debug for AlignedVec<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedVec({} elements)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_zeroed_and_may_be_empty() {
        for len in [0, 1, 15, 16, 1000] {
            let mut buffer = AlignedVec::<f32>::zeros(len);
            assert_eq!(buffer.len(), len);
            assert!(buffer.iter().all(|x| *x == 0.0));
            if len > 0 {
                assert_eq!(buffer.as_ptr().addr() % ALIGN, 0);
                buffer[len - 1] = 1.0;
            }
        }
    }
}
