//! A rank's stage for one group: plain bytes that one process writes and others read, in turns.
//!
//! Whose turn it is, posts say. Invariant: no reference to shared bytes is ever made, only copies from and
//! to them, all checked against the stage's length.

use half::bf16;

/// Bytes of the map, kept alive by whoever made it.
#[derive(Debug)]
pub(super) struct Stage {
    at: *mut u8,
    bytes: usize,
}

/// A type that ranks exchange.
pub(super) trait Element: Copy + Default {
    /// `out` becomes the sum of what the stages hold from element `at` on, in their order.
    fn sum(stages: impl Iterator<Item = Stage>, at: usize, out: &mut [Self], sums: &mut [f32]);
}

impl Stage {
    /// # Safety
    /// The bytes are mapped for as long as the stage is used, aligned for every element, and by the turns of
    /// posts no process writes them while another one reads them.
    pub(super) const unsafe fn new(at: *mut u8, bytes: usize) -> Self {
        Self { at, bytes }
    }

    /// The first of `len` elements from `first` on.
    fn element<T>(&self, first: usize, len: usize) -> *mut T {
        let end = first.checked_add(len).and_then(|end| end.checked_mul(size_of::<T>()));
        assert!(end.is_some_and(|end| end <= self.bytes), "{len} elements from {first} on");
        // SAFETY: element `first` lies inside of the stage or at its end, as just checked.
        unsafe { self.at.cast::<T>().add(first) }
    }

    pub(super) fn write<T: Element>(&self, first: usize, from: &[T]) {
        let to = self.element::<T>(first, from.len());
        // SAFETY: `element` checked the length; elements are plain numbers; the stage is this rank's to write
        // (see `new`), and no slice of the program lies in it.
        unsafe { core::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
    }

    pub(super) fn read<T: Element>(&self, first: usize, to: &mut [T]) {
        let from = self.element::<T>(first, to.len());
        // SAFETY: as for `write`; every bit pattern is a number of these types.
        unsafe { core::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) };
    }

    /// Adds what lies from `first` on to `sums`.
    fn add<T: Element + Into<f32>>(&self, first: usize, sums: &mut [f32]) {
        let from = self.element::<T>(first, sums.len());
        for (i, sum) in sums.iter_mut().enumerate() {
            // SAFETY: `i` is below the length that `element` checked; else as for `read`.
            *sum += unsafe { from.add(i).read() }.into();
        }
    }
}

impl Element for f32 {
    fn sum(mut stages: impl Iterator<Item = Stage>, at: usize, out: &mut [Self], _: &mut [f32]) {
        if let Some(first) = stages.next() {
            first.read(at, out);
        }
        stages.for_each(|stage| stage.add::<Self>(at, out));
    }
}

impl Element for bf16 {
    fn sum(stages: impl Iterator<Item = Stage>, at: usize, out: &mut [Self], sums: &mut [f32]) {
        let sums = &mut sums[..out.len()];
        // The sum of zeros keeps its sign.
        sums.fill(-0.0);
        stages.for_each(|stage| stage.add::<Self>(at, sums));
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out = Self::from_f32(*sum));
    }
}
