//! What of a program is launched together: ops that one launch makes, or launches side by side on two streams.
//!
//! It reads the program alone and launches nothing. Invariant: units are the ops in their order, but for a
//! projection inside of a block, which comes before it. Blocks of a launch read and write in no order, so the
//! tests walk through all forms that steps run units in, and compare where buffers lie.

#[cfg(test)]
mod tests;

use super::fuse::{self, Found};
use super::moe_layer;
use model::lower::{Lowered, Op};
use ops::cuda::Dtype;

/// Ops that are launched together.
#[derive(Clone, Copy)]
pub(super) enum Unit<'a> {
    One(&'a Op),
    /// A product and the activation of its results.
    Gated([&'a Op; 2]),
    /// Latent attention, without the projection.
    Block(Found<'a>),
    /// Grouped-query attention.
    Grouped(&'a [Op]),
    /// A layer of experts.
    Moe(moe_layer::Found<'a>),
}

/// Units of `ops` where activations are of `dtype`.
pub(super) fn split<'a>(lowered: &Lowered, ops: &'a [Op], dtype: Dtype) -> Vec<Unit<'a>> {
    let mut units = Vec::with_capacity(ops.len());
    let mut rest = ops;
    while let [op, after @ ..] = rest {
        let length = if let Some(found) = fuse::find(lowered, rest, dtype) {
            units.extend([Unit::One(found.projection), Unit::Block(found)]);
            Found::LENGTH
        } else if let Some(length) = fuse::find_grouped(lowered, rest, dtype) {
            units.push(Unit::Grouped(&rest[..length]));
            length
        } else if let Some(found) = moe_layer::find(lowered, rest) {
            units.push(Unit::Moe(found));
            found.length
        } else if let (Op::Linear { out, .. }, Some(act @ Op::SiluMul { gate_up, .. })) =
            (op, after.first())
            && out == gate_up
        {
            units.push(Unit::Gated([op, act]));
            2
        } else {
            units.push(Unit::One(op));
            1
        };
        rest = &rest[length..];
    }
    units
}
