//! Rewrite rules on the op list. Each replaces neighbours by one op of the same meaning.

use super::Op;

/// `residual += delta; out = norm(residual)` in one pass over the row.
pub(super) fn fuse_add_norm(ops: &mut Vec<Op>) {
    let mut fused = Vec::with_capacity(ops.len());
    for op in ops.drain(..) {
        match (fused.last(), &op) {
            (Some(&Op::Add { x: delta, target }), &Op::Norm { x, weight, eps, out })
                if target == x =>
            {
                fused.pop();
                fused.push(Op::AddNorm { delta, residual: target, weight, eps, out });
            }
            _ => fused.push(op),
        }
    }
    *ops = fused;
}
