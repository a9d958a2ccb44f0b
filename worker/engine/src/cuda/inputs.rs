//! What a step's kernels read from the host: tokens, positions, segments, tiles, tables. Written into
//! pinned memory, sent in one copy, found by kernels at addresses that depend on the bucket alone.
//!
//! It launches nothing. Invariant: what is sent fits its place, and padding is never looked at,
//! because the numbers of real rows and tiles are sent with it.

use super::limits::Limits;
use super::sizes::{Sizes, Spec};
use crate::batch::Batch;
use crate::executor::TableView;
use core::ops::Range;
use device::cuda::{Arena, Context, CudaError, DeviceSlice, Stream, Upload};
use ids::BLOCK_TOKENS;
use ops::flash::cuda::{Segment, Tile, max_tiles, tiles};
use ops::mla::cuda::decode::{Cut, Piece};
use zerocopy::FromBytes;

const OP: &str = "step inputs";
/// Parts begin on as many words.
const ALIGN_WORDS: usize = 4;

/// Where each part lies, in 32-bit words; tables at the end in 64-bit ones.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    /// Real rows.
    count: usize,
    ids: Range<usize>,
    positions: Range<usize>,
    wanted: Range<usize>,
    /// One of each per cache group.
    row_tables: Vec<Range<usize>>,
    segments: Vec<Range<usize>>,
    /// Per attention: where the number of tiles is, and the tiles.
    tiles: Vec<(usize, Range<usize>)>,
    /// Per attention: pieces of decoding rows, and their slots; empty where there are none.
    pieces: Vec<[Range<usize>; 2]>,
    /// First word of the tables.
    tables: usize,
    /// Entries of the tables, at most.
    entries: usize,
}

impl Layout {
    /// For steps padded to `bucket` rows.
    pub(super) fn new(sizes: &Sizes, limits: &Limits, bucket: usize) -> Self {
        let mut end = 0;
        let mut part = |words: usize| {
            let start = end;
            end = (start + words).next_multiple_of(ALIGN_WORDS);
            start..start + words
        };
        let segments = bucket.min(limits.slots);
        let count = part(1).start;
        let counts = part(sizes.specs.len()).start;
        let rows = [part(bucket), part(bucket), part(bucket)];
        let groups = 0..sizes.groups;
        let row_tables = groups.clone().map(|_| part(bucket)).collect();
        let segment_words = segments * size_of::<Segment>() / 4;
        let segments_of = groups.map(|_| part(segment_words)).collect();
        let tiles = sizes.specs.iter().enumerate().map(|(index, spec)| {
            let most = |(_, lines)| max_tiles(bucket, segments, spec.group(), lines);
            let most = spec.kernels.map(most).into_iter().max().unwrap_or(0);
            (counts + index, part(most * size_of::<Tile>() / 4))
        });
        let tiles = tiles.collect();
        let pieces = sizes.specs.iter().map(|spec| {
            if spec.pieces.is_none() {
                return [part(0), part(0)];
            }
            let decodes = spec.decodes(limits, bucket);
            let (most, _) = Cut::most(decodes, spec.heads, limits.multiprocessors);
            let slots = 2 * Cut::slot_entries(bucket, spec.heads);
            [part(most * Piece::WORDS), part(slots)]
        });
        let pieces = pieces.collect();
        let tables = part(0).start;
        // A table may be a block longer than the context.
        let blocks = limits.context.div_ceil(BLOCK_TOKENS as usize) + 1;
        let [ids, positions, wanted] = rows;
        Self {
            count,
            ids,
            positions,
            wanted,
            row_tables,
            segments: segments_of,
            tiles,
            pieces,
            tables,
            entries: segments.saturating_mul(blocks).saturating_mul(sizes.groups),
        }
    }

    /// Bytes of everything.
    pub(super) fn bytes(&self) -> usize {
        self.entries.saturating_mul(8).saturating_add(self.tables * 4)
    }
}

/// The parts on the device, for steps of one bucket.
pub(super) struct Views {
    pub(super) bucket: usize,
    layout: Layout,
    pub(super) count: DeviceSlice,
    pub(super) ids: DeviceSlice,
    pub(super) positions: DeviceSlice,
    pub(super) wanted: DeviceSlice,
    pub(super) row_tables: Vec<DeviceSlice>,
    pub(super) segments: Vec<DeviceSlice>,
    /// How many, and which.
    pub(super) tiles: Vec<(DeviceSlice, DeviceSlice)>,
    /// Pieces, and their slots.
    pub(super) pieces: Vec<[DeviceSlice; 2]>,
    pub(super) tables: DeviceSlice,
}

impl Views {
    fn new(layout: Layout, bucket: usize, device: &DeviceSlice) -> Self {
        let words = |range: &Range<usize>| device.slice(range.start * 4..range.end * 4);
        let word = |at: usize| device.slice(at * 4..at * 4 + 4);
        let tables = layout.tables * 4;
        Self {
            bucket,
            count: word(layout.count),
            ids: words(&layout.ids),
            positions: words(&layout.positions),
            wanted: words(&layout.wanted),
            row_tables: layout.row_tables.iter().map(words).collect(),
            segments: layout.segments.iter().map(words).collect(),
            tiles: layout.tiles.iter().map(|(at, list)| (word(*at), words(list))).collect(),
            pieces: layout.pieces.iter().map(|parts| parts.each_ref().map(words)).collect(),
            tables: device.slice(tables..tables + layout.entries * 8),
            layout,
        }
    }
}

/// Inputs of steps, staged and on the device.
pub(super) struct Inputs {
    upload: Upload,
    device: DeviceSlice,
    views: Vec<Views>,
    specs: Vec<Spec>,
    segments: Vec<Segment>,
    tiles: Vec<Tile>,
    /// Segments of one row.
    decodes: Vec<Segment>,
    /// The cut of each attention.
    cuts: Vec<Cut>,
    multiprocessors: usize,
}

impl Inputs {
    pub(super) fn take(
        context: &Context,
        arena: &mut Arena,
        sizes: &Sizes,
        limits: &Limits,
    ) -> Result<Self, CudaError> {
        let largest = Layout::new(sizes, limits, limits.rows);
        let device = arena.take(OP, largest.bytes())?;
        let most_tiles = largest.tiles.iter().map(|(_, list)| list.len()).max().unwrap_or(0);
        let cut = |spec: &Spec| {
            let decodes = spec.decodes(limits, limits.rows);
            match spec.pieces {
                Some(_) => {
                    Cut::with_capacity(limits.rows, decodes, spec.heads, limits.multiprocessors)
                }
                None => Cut::default(),
            }
        };
        let view = |bucket| Views::new(Layout::new(sizes, limits, bucket), bucket, &device);
        Ok(Self {
            upload: Upload::new(context, largest.bytes())?,
            views: limits.buckets().into_iter().map(view).collect(),
            specs: sizes.specs.clone(),
            segments: Vec::with_capacity(limits.slots.min(limits.rows)),
            tiles: Vec::with_capacity(most_tiles),
            decodes: Vec::with_capacity(limits.slots.min(limits.rows)),
            cuts: sizes.specs.iter().map(cut).collect(),
            multiprocessors: limits.multiprocessors,
            device,
        })
    }

    /// The parts of a bucket.
    pub(super) fn views(&self, bucket: usize) -> Result<&Views, CudaError> {
        let found = self.views.iter().find(|views| views.bucket == bucket);
        found.ok_or_else(|| refused(format!("{bucket} rows")))
    }

    /// Stages a batch padded to `bucket` and enqueues its copy.
    pub(super) fn send(
        &mut self,
        stream: &Stream,
        batch: &Batch,
        bucket: usize,
        tables: &TableView<'_>,
    ) -> Result<(), CudaError> {
        let Self { upload, device, views, specs, segments, tiles: list, .. } = self;
        let (decodes, cuts, multiprocessors) =
            (&mut self.decodes, &mut self.cuts, self.multiprocessors);
        let views = views.iter().find(|views| views.bucket == bucket);
        let layout = &views.ok_or_else(|| refused(format!("{bucket} rows")))?.layout;
        let (words, entries) = upload.edit()?.split_at_mut(layout.tables * 4);
        let words = <[u32]>::mut_from_bytes(words).map_err(|e| refused(e.to_string()))?;
        let entries = <[u64]>::mut_from_bytes(&mut entries[..layout.entries * 8])
            .map_err(|e| refused(e.to_string()))?;

        words[layout.count] = narrow(batch.ids.len())?;
        copy(words, &layout.ids, &batch.ids)?;
        copy(words, &layout.positions, &batch.positions)?;
        let wanted = part(words, &layout.wanted, batch.wanted.len())?;
        wanted.iter_mut().zip(&batch.wanted).for_each(|(to, wanted)| *to = wanted.row);

        let mut used = 0;
        for group in 0..layout.segments.len() {
            segments.clear();
            for run in &batch.runs {
                let table = tables.offsets(run.slot, group);
                // Only what the context covers is read or written.
                let blocks = run.context.div_ceil(BLOCK_TOKENS as usize).min(table.len());
                let room = entries.get_mut(used..used + blocks);
                room.ok_or_else(|| refused(format!("{blocks} more table entries after {used}")))?
                    .copy_from_slice(&table[..blocks]);
                let first = narrow(used)?;
                let rows = layout.row_tables[group].start + run.start;
                words[rows..rows + run.len].fill(first);
                segments.push(Segment {
                    start: narrow(run.start)?,
                    len: narrow(run.len)?,
                    context: narrow(run.context)?,
                    table: first,
                });
                used += blocks;
            }
            let flat = segments.iter().flat_map(|s| [s.start, s.len, s.context, s.table]);
            let to = part(words, &layout.segments[group], segments.len() * 4)?;
            to.iter_mut().zip(flat).for_each(|(to, word)| *to = word);

            decodes.clear();
            decodes.extend(segments.iter().filter(|segment| segment.len == 1));
            for ((spec, cut), [pieces, slots]) in specs.iter().zip(&mut *cuts).zip(&layout.pieces) {
                if spec.pieces != Some(group) {
                    continue;
                }
                cut.make(decodes, &entries[..used], bucket, spec.heads, multiprocessors);
                let to = part(words, pieces, cut.pieces.len() * Piece::WORDS)?;
                let flat = cut.pieces.iter().flat_map(Piece::words);
                to.iter_mut().zip(flat).for_each(|(to, word)| *to = word);
                copy(words, slots, cut.slots.as_flattened())?;
            }
        }
        let prompts = usize::from(has_prompts(batch));
        for (spec, (count, range)) in specs.iter().zip(&layout.tiles) {
            // Groups differ in tables alone, which tiles do not hold.
            tiles(segments, spec.group(), spec.kernels[prompts].1, list);
            if spec.pieces.is_some() {
                list.retain(|tile| segments[tile.segment as usize].len > 1);
            }
            words[*count] = narrow(list.len())?;
            let flat = list.iter().flat_map(|tile| [tile.segment, tile.line]);
            let to = part(words, range, list.len() * 2)?;
            to.iter_mut().zip(flat).for_each(|(to, word)| *to = word);
        }
        upload.send(stream, &device.slice(0..layout.tables * 4 + used * 8))
    }
}

/// Whether a batch has segments of several rows, which other kernels serve.
pub(super) fn has_prompts(batch: &Batch) -> bool {
    batch.runs.iter().any(|run| run.len > 1)
}

fn refused(why: String) -> CudaError {
    CudaError::Shape { op: OP, why }
}

fn narrow(number: usize) -> Result<u32, CudaError> {
    u32::try_from(number).map_err(|_| refused(format!("a count of {number}")))
}

/// The first `len` words of a part.
fn part<'a>(
    words: &'a mut [u32],
    range: &Range<usize>,
    len: usize,
) -> Result<&'a mut [u32], CudaError> {
    if len > range.len() {
        return Err(refused(format!("{len} words where {} fit", range.len())));
    }
    Ok(&mut words[range.start..range.start + len])
}

fn copy(words: &mut [u32], range: &Range<usize>, from: &[u32]) -> Result<(), CudaError> {
    part(words, range, from.len())?.copy_from_slice(from);
    Ok(())
}
