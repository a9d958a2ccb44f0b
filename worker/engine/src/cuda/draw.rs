//! Tiles of tokens drawn on the device: parameters there, tokens, faults and log-probabilities back.
//!
//! It keeps no state of a request. Invariant: logits stay as they are, for whoever draws on the host.

use super::asked::Lists;
use super::sizes::Sizes;
use crate::executor::RowDraw;
use device::cuda::{Arena, Context, CudaError, DeviceSlice, Download, Stream, Upload};
use ops::cuda::{Queue, Rows};
use ops::sample::cuda::{Logprobs, Sample, SampleRow, TokenLogprob, UNWANTED, logprobs, sample};
use zerocopy::FromBytes;

const OP: &str = "sample";

/// Memory of a tile's draws.
pub(super) struct Draws {
    upload: Upload,
    /// Parameters of rows, then how many tokens are listed of each, then tokens that are given.
    how: DeviceSlice,
    /// Tokens, then faults, then log-probabilities.
    drawn: DeviceSlice,
    /// Tokens that a row of the tile lists at most; `None` where no row is described.
    most: Option<usize>,
    /// Whether a row of the tile is drawn; others describe what is given.
    draws: bool,
    download: Download,
}

impl Draws {
    pub(super) fn take(
        context: &Context,
        stream: &Stream,
        arena: &mut Arena,
        sizes: &Sizes,
    ) -> Result<Self, CudaError> {
        let how = arena.take(OP, sizes.draw_bytes())?;
        let drawn = arena.take(OP, sizes.drawn_bytes())?;
        // What is not drawn or not described comes back with the rest, and no draw writes it.
        stream.fill(&drawn, 0)?;
        Ok(Self {
            upload: Upload::new(context, sizes.draw_bytes())?,
            how,
            drawn,
            most: None,
            draws: true,
            download: Download::new(context, sizes.drawn_bytes())?,
        })
    }

    /// Sends the parameters of a tile; in front of the launches that make its logits, so that nothing
    /// waits for the copy.
    pub(super) fn send(
        &mut self,
        stream: &Stream,
        rows: &[Option<RowDraw>],
    ) -> Result<(), CudaError> {
        const HOW: usize = size_of::<SampleRow>();
        let (how, words) = self.upload.edit()?.split_at_mut(rows.len() * HOW);
        let how = <[[u32; 16]]>::mut_from_bytes(how).map_err(cast)?;
        let words = <[u32]>::mut_from_bytes(&mut words[..rows.len() * 8]).map_err(cast)?;
        let (listed, given) = words.split_at_mut(rows.len());
        self.most = None;
        self.draws = rows.iter().any(|row| row.is_none_or(|row| row.given.is_none()));
        for (((how, listed), given), row) in how.iter_mut().zip(listed).zip(given).zip(rows) {
            // Of a row that the host draws the likeliest token does no harm.
            *how = row.map_or(SampleRow::GREEDY, |row| row.how).words();
            *listed = row.map_or(UNWANTED, |row| row.listed);
            *given = row.and_then(|row| row.given).unwrap_or(UNWANTED);
            if *listed != UNWANTED {
                self.most = self.most.max(Some(*listed as usize));
            }
        }
        self.upload.send(stream, &self.how.slice(0..rows.len() * (HOW + 8)))
    }

    /// Enqueues the draws of `rows` rows of logits and the way back of tokens.
    pub(super) fn enqueue(
        &mut self,
        on: Queue<'_>,
        logits: &DeviceSlice,
        (rows, vocab): (usize, usize),
        lists: &Lists,
    ) -> Result<(), CudaError> {
        const HOW: usize = size_of::<SampleRow>();
        let tokens = self.drawn.slice(0..rows * 4);
        let operands = Sample {
            logits,
            vocab,
            how: &self.how.slice(0..rows * HOW),
            seen: Some(&lists.seen),
            bias: Some((&lists.bias.0, &lists.bias.1)),
            banned: Some(&lists.banned),
            tokens: &tokens,
            faults: &self.drawn.slice(rows * 4..rows * 8),
        };
        if self.draws {
            sample(on, Rows::exactly(rows), &operands)?;
        }
        let end = rows * (8 + self.described_row() * size_of::<TokenLogprob>());
        if let Some(most) = self.most {
            let operands = Logprobs {
                logits,
                vocab,
                chosen: &tokens,
                given: Some(&self.how.slice(rows * (HOW + 4)..rows * (HOW + 8))),
                wanted: &self.how.slice(rows * HOW..rows * (HOW + 4)),
                most,
                out: &self.drawn.slice(rows * 8..end),
            };
            logprobs(on, Rows::exactly(rows), &operands)?;
        }
        self.download.start(on.stream, &self.drawn.slice(0..end))
    }

    /// Entries that describe a row of the last tile that was sent: the token drawn, and the likeliest.
    pub(super) fn described_row(&self) -> usize {
        self.most.map_or(0, |most| 1 + most)
    }

    /// Tokens and faults of the last tile, and what describes its rows, once they are here.
    pub(super) fn wait(&mut self, rows: usize) -> Result<(&[u32], &[[u32; 3]]), CudaError> {
        let described = rows * self.described_row() * size_of::<TokenLogprob>();
        let (drawn, rest) = self.download.wait()?.split_at(rows * 8);
        let drawn = <[u32]>::ref_from_bytes(drawn).map_err(cast)?;
        Ok((drawn, <[[u32; 3]]>::ref_from_bytes(&rest[..described]).map_err(cast)?))
    }
}

fn cast(error: impl std::fmt::Display) -> CudaError {
    CudaError::Shape { op: OP, why: error.to_string() }
}
