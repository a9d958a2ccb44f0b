//! Steps that were enqueued: their tokens on the way back, when they began and ended, and on the
//! device the last token of every slot, from which the next step goes on.
//!
//! It launches draws and knows no model. Invariant: what a step left is not overwritten before it was
//! collected, because no more steps are in flight than there are places.

use super::asked::Lists;
use super::limits::Limits;
use crate::executor::{Collected, DeviceTime};
use crate::flight::MOST_FLIGHTS;
use device::cuda::{Arena, Context, CudaError, DeviceSlice, Download, Event, Stream};
use ops::cuda::{Queue, Rows};
use ops::sample::cuda::{Sample, SampleRow, greedy, sample};
use ops::tokens::cuda::keep;
use zerocopy::FromBytes;

const OP: &str = "draws of a step";
/// One more than are in flight: when a step began is measured from the end of the one before.
const PLACES: usize = MOST_FLIGHTS + 1;

/// A step's place.
struct Place {
    began: Event,
    ended: Event,
    download: Download,
    /// Tokens that are wanted, and rows that were drawn.
    wanted: usize,
    rows: usize,
    launches: u32,
    /// How many kinds of steps are captured, and whether this is of one; `None` where none are wanted.
    graphs: Option<(usize, bool)>,
}

/// Steps between their launch and their collection.
pub(super) struct Ahead {
    places: Vec<Place>,
    enqueued: usize,
    collected: usize,
    /// Tokens of all rows, then faults.
    drawn: DeviceSlice,
    /// u32 `[slots]`.
    pub(super) last: DeviceSlice,
}

/// Rows whose tokens are drawn ahead, at most.
pub(super) fn most_rows(limits: &Limits) -> usize {
    limits.bucket(limits.slots.min(limits.rows))
}

/// Bytes on the device, by part.
pub(super) fn bytes(limits: &Limits) -> [usize; 2] {
    [most_rows(limits) * 2 * 4, limits.slots * 4]
}

/// A stretch of rows whose logits are there.
pub(super) struct Stretch<'a> {
    pub(super) first: usize,
    pub(super) rows: Rows<'a>,
    pub(super) logits: &'a DeviceSlice,
    /// Whether all that is drawn is the likeliest.
    pub(super) greedy: bool,
}

impl Ahead {
    pub(super) fn take(
        context: &Context,
        stream: &Stream,
        arena: &mut Arena,
        limits: &Limits,
    ) -> Result<Self, CudaError> {
        let [drawn, last] = bytes(limits);
        let place = |_| {
            Ok(Place {
                began: Event::new(context, true)?,
                ended: Event::new(context, true)?,
                download: Download::new(context, drawn)?,
                wanted: 0,
                rows: 0,
                launches: 0,
                graphs: None,
            })
        };
        let places = (0..PLACES).map(place).collect::<Result<_, CudaError>>()?;
        let drawn = arena.take(OP, drawn)?;
        // Places of padding rows come back with the others, and no draw writes them.
        stream.fill(&drawn, 0)?;
        Ok(Self { places, enqueued: 0, collected: 0, drawn, last: arena.take(OP, last)? })
    }

    /// Marks the beginning of a step.
    pub(super) fn begin(&self, stream: &Stream) -> Result<(), CudaError> {
        self.places[self.enqueued % PLACES].began.record(stream)
    }

    /// Marks its end; once more where more of it was enqueued since.
    pub(super) fn extend(&self, stream: &Stream) -> Result<(), CudaError> {
        self.places[(self.enqueued + PLACES - 1) % PLACES].ended.record(stream)
    }

    /// Marks its end, and enqueues the way back of the `wanted` first of `rows` tokens.
    pub(super) fn end(
        &mut self,
        stream: &Stream,
        wanted: usize,
        rows: usize,
    ) -> Result<(), CudaError> {
        let place = &mut self.places[self.enqueued % PLACES];
        place.ended.record(stream)?;
        (place.wanted, place.rows) = (wanted, rows);
        if wanted > 0 {
            place.download.start(stream, &self.drawn.slice(0..rows * 8))?;
        }
        self.enqueued += 1;
        Ok(())
    }

    /// Adds what the step at hand launched, beside how many graphs, and whether its body was one; `None`
    /// where none are wanted.
    pub(super) fn launched(&mut self, launches: u64, graphs: Option<(usize, bool)>) {
        let last = &mut self.places[(self.enqueued + PLACES - 1) % PLACES];
        last.launches = u32::try_from(launches).unwrap_or(u32::MAX);
        last.graphs = graphs;
    }

    /// Enqueues draws of some of `all` rows.
    pub(super) fn draw(
        &self,
        on: Queue<'_>,
        stretch: &Stretch<'_>,
        (all, vocab): (usize, usize),
        (how, lists): (&DeviceSlice, &Lists),
    ) -> Result<(), CudaError> {
        const HOW: usize = size_of::<SampleRow>();
        let (first, end) = (stretch.first, stretch.first + stretch.rows.padded);
        let tokens = self.drawn.slice(first * 4..end * 4);
        let faults = self.drawn.slice((all + first) * 4..(all + end) * 4);
        if stretch.greedy {
            return greedy(on, stretch.rows, vocab, stretch.logits, (&tokens, &faults));
        }
        let operands = Sample {
            logits: stretch.logits,
            vocab,
            how: &how.slice(first * HOW..end * HOW),
            seen: Some(&lists.seen),
            bias: Some((&lists.bias.0, &lists.bias.1)),
            banned: Some(&lists.banned),
            tokens: &tokens,
            faults: &faults,
        };
        sample(on, stretch.rows, &operands)
    }

    /// Enqueues keeping the tokens of `rows` rows for the slots in `kept`.
    pub(super) fn keep(
        &self,
        on: Queue<'_>,
        rows: usize,
        kept: &DeviceSlice,
    ) -> Result<(), CudaError> {
        let tokens = self.drawn.slice(0..rows * 4);
        keep(on, Rows::exactly(rows), &tokens, kept, &self.last)
    }

    /// Whether the oldest step is over.
    pub(super) fn ready(&self) -> Result<bool, CudaError> {
        let place = &self.places[self.collected % PLACES];
        Ok(place.ended.passed()? && place.download.arrived()?)
    }

    /// The oldest step, once it is over.
    pub(super) fn collect(&mut self) -> Result<Collected<'_>, CudaError> {
        if self.collected == self.enqueued {
            return Err(shape("nothing is in flight"));
        }
        let index = self.collected % PLACES;
        let before = (self.collected + PLACES - 1) % PLACES;
        self.places[index].ended.synchronize()?;
        let nanos = |end: &Event, start: &Event| -> Result<u64, CudaError> {
            Ok((f64::from(end.micros_since(start)?.max(0.0)) * 1e3) as u64)
        };
        let place = &self.places[index];
        let time = DeviceTime {
            run_ns: nanos(&place.ended, &place.began)?,
            idle_ns: match self.collected {
                0 => 0,
                _ => nanos(&place.began, &self.places[before].ended)?,
            },
            launches: place.launches,
            graphs: place.graphs.map_or(0, |(count, _)| u32::try_from(count).unwrap_or(u32::MAX)),
            uncaptured: place.graphs.is_some_and(|(_, captured)| !captured),
        };
        self.collected += 1;
        let place = &mut self.places[index];
        let words = <[u32]>::ref_from_bytes(&place.download.wait()?[..place.rows * 8])
            .map_err(|error| shape(&error.to_string()))?;
        let (tokens, faults) = words.split_at(place.rows);
        Ok(Collected { tokens: &tokens[..place.wanted], faults: &faults[..place.wanted], time })
    }
}

fn shape(why: &str) -> CudaError {
    CudaError::Shape { op: OP, why: why.to_owned() }
}
