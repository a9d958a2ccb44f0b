//! What of a weight, a cache row or a head range is held by one rank.

use super::LowerError;
use crate::mesh::{Axis, Mesh, Rank};
use crate::program::{CacheGroup, CacheKind, Cut, Extent, Indivisible, Shape, Weight};
use core::ops::Range;
use ids::BLOCK_TOKENS;

/// One rank's view of a mesh.
pub(super) struct Local {
    pub(super) mesh: Mesh,
    pub(super) rank: Rank,
}

/// The part of a checkpoint tensor that a rank holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalWeight {
    /// Name in the checkpoint.
    pub name: String,
    /// Which elements.
    pub region: Region,
    /// Ranks of the mesh that hold these very elements, this one included.
    pub copies: usize,
}

/// Elements of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Region {
    /// Rows and columns of a matrix `[of.0, of.1]`.
    Matrix {
        /// Rows held.
        rows: Range<usize>,
        /// Columns held.
        cols: Range<usize>,
        /// Whole shape, as the checkpoint must have it.
        of: (usize, usize),
    },
    /// Elements of a vector `[of]`.
    Vector {
        /// Elements held.
        range: Range<usize>,
        /// Whole length, as the checkpoint must have it.
        of: usize,
    },
}

impl Region {
    /// Elements held.
    #[must_use]
    pub fn elements(&self) -> usize {
        match self {
            Self::Matrix { rows, cols, .. } => rows.len() * cols.len(),
            Self::Vector { range, .. } => range.len(),
        }
    }
}

/// A cache group as one rank holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupLayout {
    /// What it keeps.
    pub kind: CacheKind,
    /// Each layer's rows inside a block.
    pub layers: Vec<LayerRow>,
    /// Elements of a block, all layers.
    pub block_elements: usize,
}

/// A layer inside a block: `[64, width]` from `offset` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerRow {
    /// First element.
    pub offset: usize,
    /// Elements of a row.
    pub width: usize,
}

impl Local {
    /// Ranks along an axis, and which of them this is.
    pub(super) const fn along(&self, axis: Axis) -> (usize, usize) {
        (self.mesh.size(axis), self.mesh.coordinate(self.rank, axis))
    }

    /// This rank's elements of a dimension that is cut over `tp`.
    pub(super) fn part(&self, extent: &Extent) -> Result<Range<usize>, Indivisible> {
        let (ranks, rank) = self.along(Axis::Tp);
        extent.part(ranks, rank)
    }

    /// This rank's units (heads) of a dimension that is cut over `tp`.
    pub(super) fn units(&self, extent: &Extent) -> Result<usize, Indivisible> {
        Ok(self.part(extent)?.len() / extent.each.max(1))
    }

    /// Experts that this rank owns.
    pub(super) fn experts(&self, of: usize) -> Result<Range<usize>, LowerError> {
        if !self.mesh.expert_parallel {
            return Ok(0..of);
        }
        let (ranks, rank) = self.along(Axis::Ep);
        if !of.is_multiple_of(ranks) {
            return Err(LowerError::Experts { experts: of, ranks });
        }
        let owned = of / ranks;
        Ok(rank * owned..(rank + 1) * owned)
    }

    pub(super) fn weight(&self, weight: &Weight) -> Result<Option<LocalWeight>, LowerError> {
        let cut = match weight.cut {
            Cut::Expert { index, of } if !self.experts(of)?.contains(&index) => return Ok(None),
            Cut::First if self.along(Axis::Tp).1 != 0 => return Ok(None),
            cut => cut,
        };
        let region = match weight.shape {
            Shape::Matrix { out, input } => {
                let rows = if cut == Cut::Out { self.part(&out)? } else { 0..out.total() };
                let cols = if cut == Cut::In { self.part(&input)? } else { 0..input.total() };
                Region::Matrix { rows, cols, of: (out.total(), input.total()) }
            }
            Shape::Vector(len) => {
                let range = if cut == Cut::Out { self.part(&len)? } else { 0..len.total() };
                Region::Vector { range, of: len.total() }
            }
        };
        let copies = match (cut, weight.shape) {
            (Cut::Whole, _) => self.mesh.world(),
            (Cut::Expert { .. }, _) => 1,
            (Cut::Out, Shape::Matrix { out: extent, .. } | Shape::Vector(extent)) => {
                // Units fewer than ranks are held by several of a shard.
                self.mesh.dp * (self.mesh.tp / extent.count.clamp(1, self.mesh.tp))
            }
            (Cut::In | Cut::First, _) => self.mesh.dp,
        };
        Ok(Some(LocalWeight { name: weight.name.clone(), region, copies }))
    }

    pub(super) fn group(&self, group: &CacheGroup) -> Result<GroupLayout, LowerError> {
        let mut offset = 0;
        let mut layers = Vec::with_capacity(group.rows.len());
        for parts in &group.rows {
            let mut width = 0;
            for part in parts {
                width += match group.kind {
                    CacheKind::Latent => part.total(),
                    CacheKind::Full | CacheKind::Sliding { .. } => self.part(part)?.len(),
                };
            }
            layers.push(LayerRow { offset, width });
            offset += width * BLOCK_TOKENS as usize;
        }
        Ok(GroupLayout { kind: group.kind, layers, block_elements: offset })
    }
}
