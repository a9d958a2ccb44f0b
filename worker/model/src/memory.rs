//! Memory arithmetic of a lowered program: what a rank needs before anything is allocated.
//!
//! Bytes of weights depend on how tensors are stored, which the caller passes; scratch of single
//! ops belongs to whoever runs them. Invariant: every sum is checked and saturates at the top.

use crate::lower::{GroupLayout, LocalWeight, Lowered, Region};
use ids::{Blocks, Bytes};

/// Bytes of an activation element on every backend so far.
pub const ACTIVATION_BYTES: usize = 4;

/// Bytes of the weights held by the rank, at `element(name)` bytes for each matrix element;
/// vectors are held in 32-bit floats.
#[must_use]
pub fn weight_bytes(lowered: &Lowered, element: impl Fn(&str) -> usize) -> Bytes {
    held_bytes(lowered.weights.iter().flatten(), element)
}

/// Bytes of those weights that other ranks hold too.
#[must_use]
pub fn replica_bytes(lowered: &Lowered, element: impl Fn(&str) -> usize) -> Bytes {
    held_bytes(lowered.weights.iter().flatten().filter(|weight| weight.copies > 1), element)
}

fn held_bytes<'a>(
    weights: impl Iterator<Item = &'a LocalWeight>,
    element: impl Fn(&str) -> usize,
) -> Bytes {
    let bytes = weights.map(|weight| {
        let each = match weight.region {
            Region::Matrix { .. } => element(&weight.name),
            Region::Vector { .. } => 4,
        };
        weight.region.elements() as u64 * each as u64
    });
    Bytes(bytes.fold(0, u64::saturating_add))
}

/// Bytes of one block of a group at `element` bytes each.
#[must_use]
pub const fn block_bytes(group: &GroupLayout, element: usize) -> Bytes {
    Bytes((group.block_elements as u64).saturating_mul(element as u64))
}

/// Bytes of KV for one sequence of `blocks` blocks in every group, windows not counted in favour.
#[must_use]
pub fn sequence_bytes(lowered: &Lowered, blocks: Blocks, element: usize) -> Bytes {
    let per_block = lowered.groups.iter().map(|group| block_bytes(group, element).0);
    Bytes(per_block.fold(0, u64::saturating_add).saturating_mul(u64::from(blocks.0)))
}

/// Bytes of activations for a step of `tokens`, the head in tiles of `head_rows` rows.
#[must_use]
pub fn activation_bytes(lowered: &Lowered, tokens: usize, head_rows: usize) -> Bytes {
    let body = lowered.body_width.saturating_mul(tokens);
    let head = lowered.head_width.saturating_mul(head_rows);
    Bytes(body.saturating_add(head).saturating_mul(ACTIVATION_BYTES) as u64)
}
