//! Where the parts of a step's inputs lie, which depends on the model, the limits and the bucket alone.
//!
//! It holds no memory. Invariant: parts do not overlap, and changes of tables are the end, so that what
//! is sent can stop behind the last one.

use crate::cuda::ahead::most_rows;
use crate::cuda::limits::Limits;
use crate::cuda::sizes::{Prompts, Sizes};
use core::ops::Range;
use ids::BLOCK_TOKENS;
use ops::flash::cuda::cut::{Cut, Piece};
use ops::flash::cuda::{Segment, Tile, max_tiles};
use ops::mla::cuda::expand::later::PASS_WORDS;
use ops::sample::cuda::SampleRow;
use ops::tokens::cuda::CHANGE_WORDS;

/// Parts begin on as many words.
const ALIGN_WORDS: usize = 4;
/// Of a row's draw.
pub(super) const HOW_WORDS: usize = size_of::<SampleRow>() / 4;

/// Where each part lies, in 32-bit words; tables at the end in 64-bit ones.
#[derive(Clone, Debug)]
pub(in crate::cuda) struct Layout {
    /// Real rows.
    pub(super) count: usize,
    pub(super) ids: Range<usize>,
    pub(super) positions: Range<usize>,
    pub(super) wanted: Range<usize>,
    /// How many are wanted.
    pub(super) wanted_count: usize,
    /// One of each per cache group.
    pub(super) row_tables: Vec<Range<usize>>,
    pub(super) segments: Vec<Range<usize>>,
    /// Per attention: where the number of tiles is, and the tiles.
    pub(super) tiles: Vec<(usize, Range<usize>)>,
    /// Per attention: pieces of decoding rows, and where a kernel reads them their slots; empty where
    /// there are none.
    pub(super) pieces: Vec<[Range<usize>; 2]>,
    /// Per attention: segments and tiles of prompts that run apart; empty where none do.
    pub(super) prompts: Vec<PromptParts>,
    /// Rows up to the last one of any segment that is not expanded.
    pub(super) absorbed: usize,
    /// Real rows of each tile of logits that is drawn ahead.
    pub(super) heads: Range<usize>,
    /// How each row is drawn ahead, and for which slot its token is kept.
    pub(super) how: Range<usize>,
    pub(super) kept: Range<usize>,
    /// How many changes of tables there are.
    pub(super) changed: usize,
    /// First word of the changes, which are the end.
    pub(super) changes: usize,
    /// Changes, at most.
    pub(super) most_changes: usize,
}

/// Prompts of an attention that run apart.
#[derive(Clone, Debug)]
pub(super) struct PromptParts {
    /// Where the number of tiles is.
    pub(super) count: Range<usize>,
    pub(super) tiles: Range<usize>,
    /// Segments whose keys are rows of the step; empty where those of the cache's group serve.
    pub(super) segments: Range<usize>,
    /// Those whose keys are gathered, in passes; empty likewise.
    pub(super) later: LaterParts,
}

/// Prompts whose keys are gathered: of every pass which are its own of the segments, their first blocks and
/// tiles of all passes.
#[derive(Clone, Debug)]
pub(super) struct LaterParts {
    pub(super) passes: Range<usize>,
    pub(super) segments: Range<usize>,
    pub(super) firsts: Range<usize>,
    pub(super) tiles: Range<usize>,
}

/// Entries of a slot's table in one group: a table may be a block longer than the context.
pub(super) fn blocks(limits: &Limits) -> usize {
    limits.context.div_ceil(BLOCK_TOKENS as usize) + 1
}

/// Entries of all tables.
pub(super) fn entries(sizes: &Sizes, limits: &Limits) -> usize {
    limits.slots.saturating_mul(sizes.groups).saturating_mul(blocks(limits))
}

/// Bytes on the device beside what is sent, by part: ids and tables.
pub(in crate::cuda) fn kept_bytes(sizes: &Sizes, limits: &Limits) -> [usize; 2] {
    [limits.rows.saturating_mul(4), entries(sizes, limits).saturating_mul(8)]
}

impl Layout {
    /// For steps padded to `bucket` rows.
    pub(in crate::cuda) fn new(sizes: &Sizes, limits: &Limits, bucket: usize) -> Self {
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
        let wanted_count = part(1).start;
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
            let Some(of) = spec.pieces else { return [part(0), part(0)] };
            let decodes = spec.decodes(limits, bucket);
            let (most, _) = Cut::most(decodes, of.lines, of.blocks(limits));
            let slots = if of.listed { 2 * Cut::slot_entries(bucket, of.lines) } else { 0 };
            [part(most * Piece::WORDS), part(slots)]
        });
        let pieces = pieces.collect();
        let prompts = sizes.prompts.iter().map(|prompts| {
            let tiles = prompts.cut().map_or(0, |cut| cut.max_tiles(bucket, segments));
            let tiles = tiles * size_of::<Tile>() / 4;
            let of = |words| if *prompts == Prompts::Expanded { words } else { 0 };
            PromptParts {
                count: part(usize::from(tiles > 0)),
                tiles: part(tiles),
                segments: part(of(segment_words)),
                later: LaterParts {
                    passes: part(of(segments * PASS_WORDS)),
                    segments: part(of(segment_words)),
                    firsts: part(of(segments)),
                    tiles: part(of(tiles)),
                },
            }
        });
        let prompts = prompts.collect();
        let absorbed = part(1).start;
        let drawn = bucket.min(most_rows(limits));
        let heads = part(drawn.div_ceil(sizes.drawn_tile));
        let how = part(drawn * HOW_WORDS);
        let kept = part(drawn);
        let changed = part(1).start;
        let changes = part(0).start;
        let [ids, positions, wanted] = rows;
        Self {
            count,
            ids,
            positions,
            wanted,
            wanted_count,
            row_tables,
            segments: segments_of,
            tiles,
            pieces,
            prompts,
            absorbed,
            heads,
            how,
            kept,
            changed,
            changes,
            most_changes: segments.saturating_mul(blocks(limits)).saturating_mul(sizes.groups),
        }
    }

    /// Whether prompts of an attention run apart.
    #[cfg(test)]
    pub(in crate::cuda) fn has_prompts(&self, spec: usize) -> bool {
        !self.prompts[spec].count.is_empty()
    }

    /// Bytes of everything.
    pub(in crate::cuda) fn bytes(&self) -> usize {
        self.most_changes.saturating_mul(4 * CHANGE_WORDS).saturating_add(self.changes * 4)
    }
}
