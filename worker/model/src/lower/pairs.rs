//! Products of the same rows behind each other whose results may be made by one, as rows of both.
//!
//! It finds them and changes no op: who runs ops one by one sees two buffers like any others. Invariant:
//! results of a pair are read by ops alone that take parts of wider rows.

use super::buffers::VECTOR;
use super::{Buffer, BufferId, Op};

/// Results of such products, in their order; a buffer is in one pair at most.
pub(super) fn find(ops: &[Op], buffers: &[Buffer]) -> Vec<[BufferId; 2]> {
    let mut pairs: Vec<[BufferId; 2]> = Vec::new();
    for (at, op) in ops.iter().enumerate() {
        let Op::Linear { x, biases, out: first, .. } = op else { continue };
        // What happens to the first result alone may stand between.
        let own =
            |op: &&Op| matches!(op, Op::HeadNorm { x, .. } | Op::Rope { x, .. } if x == first);
        let Some(Op::Linear { x: same, biases: others, out: second, .. }) =
            ops[at + 1..].iter().find(|op| !own(op))
        else {
            continue;
        };
        let [one, other] = [first, second].map(|id| &buffers[id.0]);
        let fits = one.rows == other.rows
            && [one, other].iter().all(|buffer| buffer.width.is_multiple_of(VECTOR));
        if x == same
            && biases.is_empty() == others.is_empty()
            && fits
            && !pairs.iter().flatten().any(|id| id == first)
            && takes_parts(ops, [*first, *second])
        {
            pairs.push([*first, *second]);
        }
    }
    pairs
}

/// Whether ops that read them do so row by row, wherever rows begin.
fn takes_parts(ops: &[Op], pair: [BufferId; 2]) -> bool {
    ops.iter().all(|op| match op {
        Op::HeadNorm { .. } | Op::Rope { .. } | Op::WriteKv { .. } => true,
        Op::Attention { out, .. } => !pair.contains(out),
        _ => !op.uses().reads.iter().any(|read| pair.contains(read)),
    })
}
