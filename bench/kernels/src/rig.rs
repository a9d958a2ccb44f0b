//! The device with memory for the operands of one case at a time, filled with random numbers.
//!
//! Invariant: what a case took is its own until the next [`Rig::clear`].

use crate::case::Launch;
use crate::near::Failure;
use device::cuda::{Arena, Context, CudaError, DeviceMemory, DeviceSlice, Event, Stream};
use half::bf16;
use ops::cuda::{Dtype, Gpu, Queue};
use ops::fill::{Normal, Stored, cuda::fill};
use std::ops::Range;

/// Distinct bytes that cold operands go over at least: several times the second-level cache.
pub const COLD: usize = 320 << 20;
/// Sets of operands, at most.
const MOST_SETS: usize = 1024;
/// Memory for operands, at most, and what is left to others.
const MOST_BYTES: usize = 14 << 30;
const LEFT: usize = 2 << 30;

/// Sets of operands of so many bytes each that no launch finds its own in the cache.
pub(crate) fn cold_sets(bytes: usize) -> usize {
    (COLD / bytes.max(1) + 2).min(MOST_SETS)
}

/// A generator good enough for choices on the host.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// splitmix64.
    pub(crate) const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(crate) const fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

pub(crate) struct Rig {
    pub(crate) gpu: Gpu,
    pub(crate) stream: Stream,
    context: Context,
    ends: [Event; 2],
    whole: DeviceSlice,
    arena: Arena,
    key: u64,
}

impl Rig {
    pub(crate) fn open() -> Result<Self, Failure> {
        let context = Context::open(0)?;
        ops::cuda::check(context.facts())?;
        let (gpu, stream) = (Gpu::new(&context)?, Stream::new(&context)?);
        let ends = [Event::new(&context, true)?, Event::new(&context, true)?];
        let (free, _) = context.memory()?;
        let bytes = free.saturating_sub(LEFT).min(MOST_BYTES);
        let whole = DeviceMemory::allocate(&context, "operands", bytes)?;
        let arena = Arena::new(whole.clone());
        Ok(Self { gpu, stream, context, ends, whole, arena, key: 0 })
    }

    /// Takes back what cases took.
    pub(crate) fn clear(&mut self) {
        self.arena = Arena::new(self.whole.clone());
    }

    pub(crate) const fn context(&self) -> &Context {
        &self.context
    }

    pub(crate) const fn queue(&self) -> Queue<'_> {
        Queue { gpu: &self.gpu, stream: &self.stream }
    }

    pub(crate) fn multiprocessors(&self) -> usize {
        self.gpu.facts().multiprocessors as usize
    }

    /// Memory full of NaN, for results that must be written.
    pub(crate) fn space(&mut self, bytes: usize) -> Result<DeviceSlice, Failure> {
        let slice = self.arena.take("operands", bytes)?;
        self.poison(&slice)?;
        Ok(slice)
    }

    /// For scratch that an op cuts itself.
    pub(crate) const fn arena(&mut self) -> &mut Arena {
        &mut self.arena
    }

    /// The same, and the stream on which it prepares it.
    pub(crate) const fn arena_and_stream(&mut self) -> (&mut Arena, &Stream) {
        (&mut self.arena, &self.stream)
    }

    pub(crate) fn poison(&self, slice: &DeviceSlice) -> Result<(), Failure> {
        Ok(self.stream.fill(slice, 0xFF)?)
    }

    fn filled(&mut self, elements: usize, std: f64, dtype: Dtype) -> Result<DeviceSlice, Failure> {
        let slice = self.arena.take("operands", elements * dtype.size())?;
        self.key += 1;
        let key = self.key.wrapping_mul(0xD6E8_FEB8_6659_FD93);
        let stored = if dtype == Dtype::F32 { Stored::F32 } else { Stored::Bf16 };
        fill(self.queue(), &Normal { key, mean: 0.0, std, stored }, 0, dtype, &slice)?;
        Ok(slice)
    }

    /// Random bf16 numbers.
    pub(crate) fn normal(&mut self, elements: usize, std: f64) -> Result<DeviceSlice, Failure> {
        self.filled(elements, std, Dtype::Bf16)
    }

    /// Random f32 numbers.
    pub(crate) fn normal_f32(&mut self, elements: usize, std: f64) -> Result<DeviceSlice, Failure> {
        self.filled(elements, std, Dtype::F32)
    }

    fn sent(&mut self, bytes: &[u8]) -> Result<DeviceSlice, Failure> {
        let slice = self.arena.take("operands", bytes.len())?;
        self.stream.upload(bytes, &slice)?;
        Ok(slice)
    }

    pub(crate) fn u32s(&mut self, values: &[u32]) -> Result<DeviceSlice, Failure> {
        self.sent(&values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>())
    }

    pub(crate) fn u64s(&mut self, values: &[u64]) -> Result<DeviceSlice, Failure> {
        self.sent(&values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>())
    }

    pub(crate) fn f32s(&mut self, values: &[f32]) -> Result<DeviceSlice, Failure> {
        self.sent(&values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>())
    }

    /// Runs a launch over the operands of a set to its end.
    pub(crate) fn run(&self, launch: &Launch, set: usize) -> Result<(), Failure> {
        launch(self.queue(), set)?;
        Ok(self.stream.synchronize()?)
    }

    fn fetched(&self, slice: &DeviceSlice) -> Result<Vec<u8>, Failure> {
        let mut bytes = vec![0; slice.bytes()];
        self.stream.read(slice, &mut bytes)?;
        Ok(bytes)
    }

    /// Some bf16 elements.
    pub(crate) fn bf16s(
        &self,
        slice: &DeviceSlice,
        elements: Range<usize>,
    ) -> Result<Vec<f32>, Failure> {
        let bytes = self.fetched(&slice.slice(elements.start * 2..elements.end * 2))?;
        let (pairs, _) = bytes.as_chunks();
        Ok(pairs.iter().map(|x| bf16::from_le_bytes(*x).to_f32()).collect())
    }

    /// Some elements of either type.
    pub(crate) fn floats(
        &self,
        slice: &DeviceSlice,
        elements: Range<usize>,
        dtype: Dtype,
    ) -> Result<Vec<f32>, Failure> {
        if dtype == Dtype::Bf16 {
            return self.bf16s(slice, elements);
        }
        let bytes = self.fetched(&slice.slice(elements.start * 4..elements.end * 4))?;
        let (words, _) = bytes.as_chunks();
        Ok(words.iter().map(|x| f32::from_le_bytes(*x)).collect())
    }

    /// All of a slice as words.
    pub(crate) fn words(&self, slice: &DeviceSlice) -> Result<Vec<u32>, Failure> {
        let bytes = self.fetched(slice)?;
        let (words, _) = bytes.as_chunks();
        Ok(words.iter().map(|x| u32::from_le_bytes(*x)).collect())
    }

    /// Microseconds that what `work` enqueues takes on the device.
    pub(crate) fn timed(
        &self,
        work: impl FnOnce() -> Result<(), CudaError>,
    ) -> Result<f64, Failure> {
        self.ends[0].record(&self.stream)?;
        work()?;
        self.ends[1].record(&self.stream)?;
        self.stream.synchronize()?;
        Ok(f64::from(self.ends[1].micros_since(&self.ends[0])?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_defeat_the_cache_within_reason() {
        assert!(cold_sets(1 << 20) * (1 << 20) > COLD);
        assert_eq!(cold_sets(usize::MAX), 2);
        assert_eq!(cold_sets(0), MOST_SETS);
    }
}
