//! What a step's kernels read from the host: tokens, positions, segments, tiles, draws, and what
//! changed in block tables. Written into pinned memory, sent in one copy, found by kernels at addresses
//! that depend on the bucket alone. Tables stay on the device, a place for each slot.
//!
//! It launches nothing. Invariants: what is sent fits its place, and padding is never looked at,
//! because the numbers of real rows and tiles are sent with it. Pinned memory is written only after
//! the copy that reads it, of the step before the last; the device's only by the stream's order.

mod layout;
mod views;

pub(super) use layout::{Layout, kept_bytes};
pub(super) use views::{LaterViews, PromptViews, Views};

use super::graphs::Absorbed;
use super::limits::Limits;
use super::sizes::{Prompts, Sizes, Spec};
use crate::batch::{Batch, Run};
use crate::executor::{RowDraw, TableView};
use core::ops::Range;
use device::cuda::{Arena, Context, CudaError, DeviceSlice, Stream, Upload};
use ids::{BLOCK_TOKENS, SlotGeneration, SlotId};
use layout::{HOW_WORDS, blocks, entries};
use ops::flash::cuda::cut::{Cut, Piece};
use ops::flash::cuda::{Segment, Tile, tiles};
use ops::mla::cuda::expand::later::{PASS_WORDS, Passes, is_later};
use ops::mla::cuda::expand::{self, Room};
use ops::sample::cuda::SampleRow;
use ops::tokens::NOT_KEPT;
use ops::tokens::cuda::CHANGE_WORDS;
use zerocopy::FromBytes;

const OP: &str = "step inputs";
/// Inputs of steps, staged and on the device.
pub(super) struct Inputs {
    /// Used in turn, so that a step is staged while the one before is copied.
    uploads: [Upload; 2],
    turn: usize,
    device: DeviceSlice,
    /// Tokens of the rows of the step that runs.
    pub(super) ids: DeviceSlice,
    views: Vec<Views>,
    sent: Sent,
    specs: Vec<Spec>,
    /// What runs apart, by attention.
    prompts: Vec<Prompts>,
    /// Which of that in passes in the step at hand, and what each is padded to.
    passes: Passes,
    padded: Vec<usize>,
    room: Option<Room>,
    tile: usize,
    segments: Vec<Segment>,
    tiles: Vec<Tile>,
    /// Segments of one row.
    decodes: Vec<Segment>,
    /// The cut of each attention.
    cuts: Vec<Cut>,
    limits: Limits,
}

/// What the device has of tables.
struct Sent {
    groups: usize,
    blocks: usize,
    /// Whose tables, by slot.
    lives: Vec<Option<SlotGeneration>>,
    /// How many entries, by slot and group.
    entries: Vec<usize>,
}

impl Sent {
    /// First entry of a table.
    const fn first(&self, slot: usize, group: usize) -> usize {
        (slot * self.groups + group) * self.blocks
    }

    /// What an entry of the tables holds.
    fn offset(&self, tables: &TableView<'_>, entry: usize) -> Option<u64> {
        let (table, block) = (entry / self.blocks, entry % self.blocks);
        let slot = SlotId(u32::try_from(table / self.groups).ok()?);
        tables.offsets(slot, table % self.groups).get(block).copied()
    }

    /// Counts the first `blocks` entries of a table as sent; returns those that were not.
    fn grow(
        &mut self,
        (slot, group): (usize, usize),
        life: Option<SlotGeneration>,
        blocks: usize,
    ) -> Range<usize> {
        let all = slot * self.groups..(slot + 1) * self.groups;
        if self.lives[slot] != life {
            self.lives[slot] = life;
            self.entries[all.clone()].fill(0);
        }
        let held = &mut self.entries[all][group];
        let new = *held..blocks.max(*held);
        *held = new.end;
        new
    }
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
        let [ids, tables] = kept_bytes(sizes, limits);
        let (ids, tables) = (arena.take(OP, ids)?, arena.take("block tables", tables)?);
        // Places in tables are 32 bits.
        narrow(entries(sizes, limits))?;
        let prompts = largest.prompts.iter().map(|of| of.tiles.len());
        let most_tiles = largest.tiles.iter().map(|(_, list)| list.len()).chain(prompts).max();
        let most_tiles = most_tiles.unwrap_or(0);
        let cut = |spec: &Spec| {
            let decodes = spec.decodes(limits, limits.rows);
            match spec.pieces {
                Some(of) => Cut::with_capacity(limits.rows, decodes, of.lines, of.blocks(limits)),
                None => Cut::default(),
            }
        };
        let view =
            |bucket| Views::new(Layout::new(sizes, limits, bucket), bucket, &device, &tables);
        let upload = || Upload::new(context, largest.bytes());
        Ok(Self {
            uploads: [upload()?, upload()?],
            turn: 0,
            views: limits.buckets().into_iter().map(view).collect(),
            sent: Sent {
                groups: sizes.groups,
                blocks: blocks(limits),
                lives: vec![None; limits.slots],
                entries: vec![0; limits.slots * sizes.groups],
            },
            specs: sizes.specs.clone(),
            prompts: sizes.prompts.clone(),
            passes: match sizes.prompts.contains(&Prompts::Expanded) {
                true => Passes::with_capacity(limits.rows, limits.slots),
                false => Passes::default(),
            },
            padded: Vec::with_capacity(limits.slots),
            room: sizes.expanded(limits).map(|(_, room)| room),
            tile: sizes.drawn_tile,
            segments: Vec::with_capacity(limits.slots.min(limits.rows)),
            tiles: Vec::with_capacity(most_tiles),
            decodes: Vec::with_capacity(limits.slots.min(limits.rows)),
            cuts: sizes.specs.iter().map(cut).collect(),
            limits: *limits,
            ids,
            device,
        })
    }

    /// The parts of a bucket.
    pub(super) fn views(&self, bucket: usize) -> Result<&Views, CudaError> {
        let found = self.views.iter().find(|views| views.bucket == bucket);
        found.ok_or_else(|| refused(format!("{bucket} rows")))
    }

    /// What the passes of the step at hand are padded to.
    pub(super) fn passes(&self) -> &[usize] {
        &self.padded
    }

    /// Stages a batch padded to `bucket` and enqueues its copy. With `draws`, one per wanted row, all
    /// tokens are drawn ahead.
    pub(super) fn send(
        &mut self,
        stream: &Stream,
        batch: &Batch,
        bucket: usize,
        tables: &TableView<'_>,
        draws: Option<&[Option<RowDraw>]>,
    ) -> Result<(), CudaError> {
        let Self { uploads, turn, device, views, sent, specs, tile, segments, tiles: list, .. } =
            self;
        let (decodes, cuts, limits) = (&mut self.decodes, &mut self.cuts, &self.limits);
        let (apart, passes, room) = (&self.prompts, &mut self.passes, self.room);
        let padded = &mut self.padded;
        let views = views.iter().find(|views| views.bucket == bucket);
        let layout = &views.ok_or_else(|| refused(format!("{bucket} rows")))?.layout;
        *turn = (*turn + 1) % uploads.len();
        let upload = &mut uploads[*turn];
        let (words, changes) = upload.edit()?.split_at_mut(layout.changes * 4);
        let words = <[u32]>::mut_from_bytes(words).map_err(|e| refused(e.to_string()))?;
        let changes = &mut changes[..layout.most_changes * 4 * CHANGE_WORDS];
        let changes =
            <[[u32; CHANGE_WORDS]]>::mut_from_bytes(changes).map_err(|e| refused(e.to_string()))?;

        words[layout.count] = narrow(batch.ids.len())?;
        words[layout.wanted_count] = narrow(batch.wanted.len())?;
        copy(words, &layout.ids, &batch.ids)?;
        copy(words, &layout.positions, &batch.positions)?;
        let wanted = part(words, &layout.wanted, batch.wanted.len())?;
        wanted.iter_mut().zip(&batch.wanted).for_each(|(to, wanted)| *to = wanted.row);
        stage_draws(words, layout, batch, *tile, draws)?;

        let mut changed = 0;
        for group in 0..layout.segments.len() {
            segments.clear();
            for run in &batch.runs {
                let table = tables.offsets(run.slot, group);
                let slot = run.slot.index();
                // Only what the context covers is read or written.
                let blocks = run.context.div_ceil(BLOCK_TOKENS as usize).min(table.len());
                let start = sent.first(slot, group);
                for block in sent.grow((slot, group), tables.life(run.slot), blocks) {
                    let to = changes.get_mut(changed);
                    let to = to.ok_or_else(|| refused(format!("{changed} changes of tables")))?;
                    let offset = table[block];
                    *to = [narrow(start + block)?, offset as u32, (offset >> 32) as u32];
                    changed += 1;
                }
                let first = narrow(start)?;
                let rows = layout.row_tables[group].start + run.start;
                words[rows..rows + run.len].fill(first);
                segments.push(Segment {
                    start: narrow(run.start)?,
                    len: narrow(run.len)?,
                    context: narrow(run.context)?,
                    table: first,
                });
            }
            put_segments(words, &layout.segments[group], segments.iter().copied())?;

            decodes.clear();
            decodes.extend(segments.iter().filter(|segment| segment.len == 1));
            for ((spec, cut), [pieces, slots]) in specs.iter().zip(&mut *cuts).zip(&layout.pieces) {
                let Some(of) = spec.pieces.filter(|pieces| pieces.group == group) else { continue };
                let at = |entry| sent.offset(tables, entry);
                cut.make(decodes, at, bucket, of.lines, of.blocks(limits));
                let to = part(words, pieces, cut.pieces.len() * Piece::WORDS)?;
                let flat = cut.pieces.iter().flat_map(Piece::words);
                to.iter_mut().zip(flat).for_each(|(to, word)| *to = word);
                if of.listed {
                    copy(words, slots, cut.slots.as_flattened())?;
                }
            }
        }
        words[layout.changed] = narrow(changed)?;
        let prompts = usize::from(has_prompts(batch));
        for (index, (spec, (count, range))) in specs.iter().zip(&layout.tiles).enumerate() {
            // Groups differ in tables alone, which tiles do not hold.
            tiles(segments, spec.group(), spec.kernels[prompts].1, list);
            let elsewhere = |of: &Segment| {
                let decodes = spec.pieces.is_some() && of.len == 1;
                decodes || apart[index].takes(of)
            };
            list.retain(|tile| !elsewhere(&segments[tile.segment as usize]));
            words[*count] = narrow(list.len())?;
            put_tiles(words, range, list)?;
        }
        match room {
            Some(room) => passes.make(segments, room),
            None => passes.clear(),
        }
        padded.clear();
        padded.extend(passes.passes.iter().map(|pass| pass.padded));
        for (of, prompts) in layout.prompts.iter().zip(apart) {
            let Some(cut) = prompts.cut() else { continue };
            let expanded = *prompts == Prompts::Expanded;
            let here =
                |segment: &Segment| prompts.takes(segment) && !(expanded && is_later(segment));
            cut.tiles(segments, here, list);
            part(words, &of.count, 1)?[0] = narrow(list.len())?;
            put_tiles(words, &of.tiles, list)?;
            if expanded {
                let rows = segments.iter().map(|s| Segment { table: s.start, ..*s });
                put_segments(words, &of.segments, rows)?;
                let to = part(words, &of.later.passes, passes.passes.len() * PASS_WORDS)?;
                for (to, pass) in to.chunks_exact_mut(PASS_WORDS).zip(&passes.passes) {
                    to.copy_from_slice(&pass.words());
                }
                put_segments(words, &of.later.segments, passes.segments.iter().copied())?;
                copy(words, &of.later.firsts, &passes.firsts)?;
                put_tiles(words, &of.later.tiles, &passes.tiles)?;
            }
        }
        let others = segments.iter().filter(|segment| !expand::is_expanded(segment));
        words[layout.absorbed] = others.map(|s| s.start + s.len).max().unwrap_or(0);
        upload.send(stream, &device.slice(0..(layout.changes + changed * CHANGE_WORDS) * 4))
    }
}

/// Stages how tokens are drawn ahead and for whom they are kept; without `draws` none are.
fn stage_draws(
    words: &mut [u32],
    layout: &Layout,
    batch: &Batch,
    tile: usize,
    draws: Option<&[Option<RowDraw>]>,
) -> Result<(), CudaError> {
    let draws = draws.unwrap_or_default();
    for (index, head) in layout.heads.clone().enumerate() {
        words[head] = narrow(draws.len().saturating_sub(index * tile).min(tile))?;
    }
    words[layout.kept.clone()].fill(NOT_KEPT);
    let kept = part(words, &layout.kept, draws.len())?;
    kept.iter_mut().zip(&batch.wanted).for_each(|(to, wanted)| *to = wanted.slot.0);
    let how = part(words, &layout.how, draws.len() * HOW_WORDS)?;
    for (to, draw) in how.chunks_exact_mut(HOW_WORDS).zip(draws) {
        to.copy_from_slice(&draw.map_or(SampleRow::GREEDY, |draw| draw.how).words());
    }
    Ok(())
}

/// Whether a batch has segments of several rows, which other kernels serve.
pub(super) fn has_prompts(batch: &Batch) -> bool {
    batch.runs.iter().any(|run| run.len > 1)
}

/// Whether a batch has prompts that lie in it as a whole.
pub(super) fn has_whole(batch: &Batch) -> bool {
    batch.runs.iter().any(|run| expand::is_whole(&segment_of(run)))
}

/// A run as a segment, as far as that says which kernels serve it.
fn segment_of(run: &Run) -> Segment {
    Segment { start: 0, len: run.len as u32, context: run.context as u32, table: 0 }
}

/// Which rows of a batch run absorbed where prompts may run expanded.
pub(super) fn absorbed(batch: &Batch) -> Absorbed {
    let of = |run: &Run| match run.len {
        1 => Absorbed::Decodes,
        _ if expand::is_expanded(&segment_of(run)) => Absorbed::Nothing,
        _ => Absorbed::Chunks,
    };
    batch.runs.iter().map(of).max().unwrap_or(Absorbed::Nothing)
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

fn put_segments(
    words: &mut [u32],
    range: &Range<usize>,
    segments: impl ExactSizeIterator<Item = Segment>,
) -> Result<(), CudaError> {
    let to = part(words, range, segments.len() * 4)?;
    let flat = segments.flat_map(|s| [s.start, s.len, s.context, s.table]);
    to.iter_mut().zip(flat).for_each(|(to, word)| *to = word);
    Ok(())
}

fn put_tiles(words: &mut [u32], range: &Range<usize>, tiles: &[Tile]) -> Result<(), CudaError> {
    let flat = tiles.iter().flat_map(|tile| [tile.segment, tile.line]);
    let to = part(words, range, tiles.len() * 2)?;
    to.iter_mut().zip(flat).for_each(|(to, word)| *to = word);
    Ok(())
}

fn copy(words: &mut [u32], range: &Range<usize>, from: &[u32]) -> Result<(), CudaError> {
    part(words, range, from.len())?.copy_from_slice(from);
    Ok(())
}
