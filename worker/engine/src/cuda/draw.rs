//! Tokens drawn on the device: parameters there, tokens and faults back.
//!
//! It keeps no state of a request. Invariant: rows that are not to be drawn keep their logits.

use super::sizes::Sizes;
use device::cuda::{Arena, Context, CudaError, DeviceSlice, Download, Stream, Upload};
use ops::cuda::{Queue, Rows};
use ops::sample::cuda::{Sample, SampleRow, sample};
use zerocopy::FromBytes;

const OP: &str = "sample";

/// Memory of a tile's draws.
pub(super) struct Draws {
    upload: Upload,
    how: DeviceSlice,
    /// Tokens, then faults.
    drawn: DeviceSlice,
    download: Download,
}

impl Draws {
    pub(super) fn take(
        context: &Context,
        arena: &mut Arena,
        sizes: &Sizes,
    ) -> Result<Self, CudaError> {
        Ok(Self {
            upload: Upload::new(context, sizes.draw_bytes())?,
            how: arena.take(OP, sizes.draw_bytes())?,
            drawn: arena.take(OP, sizes.drawn_bytes())?,
            download: Download::new(context, sizes.drawn_bytes())?,
        })
    }

    /// Sends the parameters of a tile; in front of the launches that make its logits, so that nothing
    /// waits for the copy.
    pub(super) fn send(
        &mut self,
        stream: &Stream,
        rows: &[Option<SampleRow>],
    ) -> Result<(), CudaError> {
        let words = <[[u32; 16]]>::mut_from_bytes(self.upload.edit()?).map_err(cast)?;
        for (to, row) in words.iter_mut().zip(rows) {
            // The likeliest token is found without touching the row.
            *to = row.unwrap_or(SampleRow::GREEDY).words();
        }
        let bytes = rows.len() * size_of::<SampleRow>();
        self.upload.send(stream, &self.how.slice(0..bytes))
    }

    /// Enqueues the draws of `rows` rows of logits and the way back of tokens.
    pub(super) fn enqueue(
        &mut self,
        on: Queue<'_>,
        logits: &DeviceSlice,
        vocab: usize,
        rows: usize,
    ) -> Result<(), CudaError> {
        let operands = Sample {
            logits,
            vocab,
            how: &self.how,
            seen: None,
            bias: None,
            banned: None,
            tokens: &self.drawn.slice(0..rows * 4),
            faults: &self.drawn.slice(rows * 4..rows * 8),
        };
        sample(on, Rows::exactly(rows), &operands)?;
        self.download.start(on.stream, &self.drawn.slice(0..rows * 8))
    }

    /// Tokens and faults of the last tile, once they are here.
    pub(super) fn wait(&mut self, rows: usize) -> Result<&[u32], CudaError> {
        <[u32]>::ref_from_bytes(&self.download.wait()?[..rows * 8]).map_err(cast)
    }
}

fn cast(error: impl std::fmt::Display) -> CudaError {
    CudaError::Shape { op: OP, why: error.to_string() }
}
