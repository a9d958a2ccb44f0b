//! The way of weights from files and memory to the device: several threads, each with two pinned
//! buffers of which one is filled while the other is copied.
//!
//! Files are read in large pieces straight into pinned memory where they hold what the device
//! computes with, so that neither one processor nor page faults but disk or bus set the pace. It
//! decides no place. Invariant: when [`send`] returns, every byte has arrived, or an error says which
//! weight did not.

#[cfg(test)]
mod tests;

use crate::{EngineError, WeightError};
use device::cuda::{Context, DeviceSlice, Stream, Upload};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use ops::WeightSlice;
use ops::cuda::Dtype;
use std::borrow::Cow;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use weights::{Float, Stored};
use zerocopy::{FromBytes, IntoBytes};

/// Bytes of one pinned buffer: long enough for a disk's full rate, short enough that pinning some
/// of them does not delay the start.
const PIECE: usize = 4 << 20;
/// Threads that fill buffers; more than these do not fill a bus faster.
const THREADS: usize = 12;
/// What a failed cast means.
const ALIGNED: &str = "the buffer is aligned, whole elements of it were taken";

/// Told bytes done and bytes in all, now and then, from any thread.
pub(crate) type Report<'a> = &'a (dyn Fn(u64, u64) + Sync);

/// One weight and where it goes.
pub(super) struct Transfer<'a> {
    pub(super) name: &'a str,
    pub(super) from: Elements<'a>,
    pub(super) dtype: Dtype,
    pub(super) to: DeviceSlice,
}

/// Where elements are.
pub(super) enum Elements<'a> {
    Held(WeightSlice<'a>),
    Stored(Stored),
    Vector(Cow<'a, [f32]>),
}

impl Elements<'_> {
    /// Writes some of them as `dtype`; `raw` holds them as they are stored where that differs.
    fn write(
        &self,
        name: &str,
        range: Range<usize>,
        dtype: Dtype,
        raw: &mut Vec<f32>,
        to: &mut [u8],
    ) -> Result<(), WeightError> {
        let stored = match self {
            Self::Stored(stored) => stored,
            Self::Held(data) => {
                convert(data.range(range), dtype, to);
                return Ok(());
            }
            Self::Vector(data) => {
                convert(WeightSlice::F32(&data[range]), dtype, to);
                return Ok(());
            }
        };
        let size = stored.float.bytes();
        let read = |to: &mut [u8]| {
            stored.read(range.start * size, to).map_err(|source| {
                let path = stored.path().to_owned();
                WeightError::Read { name: name.to_owned(), path, source }
            })
        };
        if let (Float::F32, Dtype::F32) | (Float::Bf16, Dtype::Bf16) = (stored.float, dtype) {
            return read(to);
        }
        let bytes = range.len() * size;
        raw.resize(bytes.div_ceil(size_of::<f32>()), 0.0);
        let raw = &mut raw.as_mut_slice().as_mut_bytes()[..bytes];
        read(raw)?;
        let elements = match stored.float {
            Float::F32 => WeightSlice::F32(<[f32]>::ref_from_bytes(raw).expect(ALIGNED)),
            Float::Bf16 => WeightSlice::Bf16(<[bf16]>::ref_from_bytes(raw).expect(ALIGNED)),
            Float::F16 => WeightSlice::F16(<[f16]>::ref_from_bytes(raw).expect(ALIGNED)),
        };
        convert(elements, dtype, to);
        Ok(())
    }
}

/// What the threads share.
struct Work<'a> {
    context: &'a Context,
    stream: &'a Stream,
    transfers: &'a [Transfer<'a>],
    /// Pieces: which transfer, which of its elements.
    pieces: Vec<(usize, Range<usize>)>,
    next: AtomicUsize,
    /// Bytes of a buffer.
    room: usize,
    done: AtomicU64,
    total: u64,
    report: Report<'a>,
}

/// Sends everything through `stream`, and waits.
pub(super) fn send(
    context: &Context,
    stream: &Stream,
    transfers: &[Transfer<'_>],
    threads: usize,
    report: Report<'_>,
) -> Result<(), EngineError> {
    let pieces: Vec<(usize, Range<usize>)> = (0..)
        .zip(transfers)
        .flat_map(|(index, Transfer { dtype, to, .. })| {
            let (each, all) = (PIECE / dtype.size(), to.bytes() / dtype.size());
            (0..all).step_by(each).map(move |first| (index, first..(first + each).min(all)))
        })
        .collect();
    let threads = threads.clamp(1, THREADS).min(pieces.len());
    let largest = transfers.iter().map(|transfer| transfer.to.bytes()).max().unwrap_or(0);
    let work = Work {
        context,
        stream,
        transfers,
        pieces,
        next: AtomicUsize::new(0),
        room: largest.min(PIECE),
        done: AtomicU64::new(0),
        total: transfers.iter().map(|transfer| transfer.to.bytes() as u64).sum(),
        report,
    };
    let failed = Mutex::new(None);
    let body = || {
        if let Err(error) = work.run() {
            // Nobody begins another piece.
            work.next.store(work.pieces.len(), Ordering::Relaxed);
            let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
            failed.get_or_insert(error);
        }
    };
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(body);
        }
    });
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    failed.map_or(Ok(()), Err)?;
    Ok(stream.synchronize()?)
}

impl Work<'_> {
    /// Sends pieces until none is left.
    fn run(&self) -> Result<(), EngineError> {
        self.context.enter()?;
        let mut uploads =
            [Upload::new(self.context, self.room)?, Upload::new(self.context, self.room)?];
        let mut raw = Vec::new();
        for turn in 0.. {
            let next = self.next.fetch_add(1, Ordering::Relaxed);
            let Some((index, range)) = self.pieces.get(next) else { break };
            let transfer = &self.transfers[*index];
            let size = transfer.dtype.size();
            let to = transfer.to.slice(range.start * size..range.end * size);
            let upload = &mut uploads[turn % 2];
            let room = &mut upload.edit()?[..to.bytes()];
            transfer.from.write(transfer.name, range.clone(), transfer.dtype, &mut raw, room)?;
            upload.send(self.stream, &to)?;
            let sent = to.bytes() as u64;
            (self.report)(self.done.fetch_add(sent, Ordering::Relaxed) + sent, self.total);
        }
        Ok(())
    }
}

/// Writes elements as `dtype`; `to` has their length.
fn convert(from: WeightSlice<'_>, dtype: Dtype, to: &mut [u8]) {
    match (from, dtype) {
        (WeightSlice::F32(from), Dtype::F32) => to.copy_from_slice(from.as_bytes()),
        (WeightSlice::Bf16(from), Dtype::Bf16) => to.copy_from_slice(from.as_bytes()),
        (WeightSlice::F32(from), Dtype::Bf16) => {
            <[bf16]>::mut_from_bytes(to).expect(ALIGNED).convert_from_f32_slice(from);
        }
        (WeightSlice::F16(from), Dtype::Bf16) => {
            let to = <[bf16]>::mut_from_bytes(to).expect(ALIGNED);
            let round = |from: &f16| bf16::from_f32(from.to_f32());
            to.iter_mut().zip(from).for_each(|(to, from)| *to = round(from));
        }
        (WeightSlice::Bf16(from), Dtype::F32) => {
            from.convert_to_f32_slice(<[f32]>::mut_from_bytes(to).expect(ALIGNED));
        }
        (WeightSlice::F16(from), Dtype::F32) => {
            from.convert_to_f32_slice(<[f32]>::mut_from_bytes(to).expect(ALIGNED));
        }
    }
}
