//! What there is to compute, cut into pieces: a tile of query rows against one split of the keys.

use super::SPLIT;
use crate::paged::Segment;
use std::ops::Range;

/// Rows of segments to attend for, all tiles of all heads.
pub(crate) struct Work<'a> {
    pub(crate) segments: &'a [Segment<'a>],
    /// Rows of the batch to compute; others are left out.
    pub(crate) rows: Range<usize>,
    /// Heads that have keys of their own.
    pub(crate) heads: usize,
    /// Query rows of a tile.
    pub(crate) tile: usize,
    /// Keys that a row sees, the newest included.
    pub(crate) window: Option<usize>,
}

/// One tile against one split. Pieces of a tile follow each other in the order of their keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Index into the segments.
    pub(crate) segment: usize,
    pub(crate) head: usize,
    /// First row, counted in the segment.
    pub(crate) first: usize,
    /// Rows.
    pub(crate) rows: usize,
    /// Positions of the keys.
    pub(crate) begin: usize,
    pub(crate) end: usize,
    /// Whether this is the tile's first split.
    pub(crate) opens: bool,
    /// Whether this is the tile's last split.
    pub(crate) closes: bool,
}

impl Work<'_> {
    /// The pieces, tile by tile.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = Piece> {
        (0..self.segments.len()).flat_map(move |segment| {
            let rows = self.rows_of(segment);
            (0..self.heads).flat_map(move |head| {
                rows.clone().step_by(self.tile).flat_map({
                    let rows = rows.clone();
                    move |first| {
                        let count = (rows.end - first).min(self.tile);
                        self.tile_pieces(segment, head, first, count)
                    }
                })
            })
        })
    }

    /// Rows of a segment that are to be computed, counted in the segment.
    fn rows_of(&self, segment: usize) -> Range<usize> {
        let Segment { start, len, .. } = self.segments[segment];
        let begin = self.rows.start.clamp(start, start + len);
        let end = self.rows.end.clamp(start, start + len);
        begin - start..end - start
    }

    fn tile_pieces(
        &self,
        segment: usize,
        head: usize,
        first: usize,
        rows: usize,
    ) -> impl Iterator<Item = Piece> + use<> {
        let at = &self.segments[segment];
        let begin = visible(at.position(first), self.window).start;
        let end = at.position(first + rows - 1) + 1;
        let splits = begin / SPLIT..end.div_ceil(SPLIT);
        let (opens, closes) = (splits.start, splits.end - 1);
        splits.map(move |split| Piece {
            segment,
            head,
            first,
            rows,
            begin: begin.max(split * SPLIT),
            end: end.min((split + 1) * SPLIT),
            opens: split == opens,
            closes: split == closes,
        })
    }
}

/// Positions that the row at `position` sees: itself and what came before, inside the window.
pub(crate) fn visible(position: usize, window: Option<usize>) -> Range<usize> {
    let end = position + 1;
    window.map_or(0, |window| end.saturating_sub(window))..end
}
