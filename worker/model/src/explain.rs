//! A lowered program as a table for people: ops, shapes, weights, bytes of collectives, totals.
//!
//! Layers that repeat exactly are shown once. It computes nothing that the lowering has not decided.

use crate::lower::{BufferId, LocalAttention, Lowered, Op, Region, Rows};
use crate::memory::{ACTIVATION_BYTES, activation_bytes, block_bytes, replica_bytes, weight_bytes};
use crate::mesh::{Axis, Mesh};
use crate::program::{CacheKind, WeightId};
use ids::Bytes;
use std::fmt::Write;

/// How elements are stored, for bytes.
#[derive(Clone, Copy, Debug)]
pub struct Storage {
    /// Bytes of a weight element.
    pub weight: usize,
    /// Bytes of a cache element.
    pub cache: usize,
}

/// Bytes that a collective sends from each rank, by the ring algorithm, at the program's bucket.
#[must_use]
pub fn collective_bytes(lowered: &Lowered, op: &Op) -> Bytes {
    let (buffer, axis, passes) = match *op {
        Op::AllReduce { x, axis } => (x, axis, 2),
        Op::AllGather { out, axis, .. } => (out, axis, 1),
        Op::ReduceScatter { x, axis, .. } => (x, axis, 1),
        _ => return Bytes(0),
    };
    let ranks = lowered.mesh.size(axis);
    let whole = lowered.buffers[buffer.0].per_token() * lowered.bucket * ACTIVATION_BYTES;
    Bytes((passes * whole * (ranks - 1) / ranks) as u64)
}

/// Text for `tokenmill model explain`. `kernel` names what an op runs; the lowering does not know.
#[must_use]
pub fn explain(lowered: &Lowered, storage: Storage, kernel: impl Fn(&Op) -> String) -> String {
    let mut text = String::new();
    let Mesh { dp, tp, expert_parallel } = lowered.mesh;
    let ep = if expert_parallel { dp * tp } else { 1 };
    let _ = writeln!(
        text,
        "rank {} of dp {dp} x tp {tp} (ep {ep}), bucket of {} tokens\n",
        lowered.rank.0, lowered.bucket
    );
    let _ = writeln!(
        text,
        "{:>4}  {:<14} {:<16} {:<34} {:>12}  weights",
        "op", "kind", "kernel", "shapes", "bytes"
    );
    let lines: Vec<_> = lowered
        .body
        .iter()
        .chain(&lowered.head)
        .map(|op| line(lowered, op, storage, &kernel(op)))
        .collect();
    for (at, repeat) in fold_layers(&lowered.body, lowered) {
        let _ = writeln!(text, "{at:>4}  {}", lines[at]);
        if let Some((length, times)) = repeat {
            let _ = writeln!(text, "      ... ops {}-{} repeat {times} times", at + 1 - length, at);
        }
    }
    for (at, line) in lines.iter().enumerate().skip(lowered.body.len()) {
        let _ = writeln!(text, "{at:>4}  {line}");
    }
    totals(&mut text, lowered, storage);
    text
}

fn line(lowered: &Lowered, op: &Op, storage: Storage, kernel: &str) -> String {
    let uses = op.uses();
    let shape = |id: BufferId| {
        let buffer = &lowered.buffers[id.0];
        let rows = match buffer.rows {
            Rows::Shard => "t".to_owned(),
            Rows::AllShards(shards) => format!("{shards}t"),
        };
        format!("[{rows},{}]", buffer.width)
    };
    let mut shapes: String = uses.reads.iter().map(|&id| shape(id)).collect();
    if let Some(out) = uses.writes {
        let _ = write!(shapes, " -> {}", shape(out));
    }
    if let Op::Attention { attention, .. } = op {
        let heads = match attention {
            LocalAttention::Gqa { heads, kv_heads, .. } => format!(" h{heads}/{kv_heads}"),
            LocalAttention::Mla { heads, .. } => format!(" h{heads}"),
        };
        shapes.push_str(&heads);
    }
    let weights = op.weights();
    let moved = collective_bytes(lowered, op).0;
    let bytes = if moved > 0 { moved } else { held_bytes(lowered, &weights, storage) };
    let names = names(lowered, &weights);
    let axis = match op {
        Op::AllReduce { axis, .. }
        | Op::AllGather { axis, .. }
        | Op::ReduceScatter { axis, .. } => {
            format!("over {axis}")
        }
        _ => names,
    };
    format!("{:<14} {kernel:<16} {shapes:<34} {bytes:>12}  {axis}", op.name()).trim_end().to_owned()
}

fn held_bytes(lowered: &Lowered, weights: &[WeightId], storage: Storage) -> u64 {
    let held = weights.iter().filter_map(|id| lowered.weights[id.0].as_ref());
    let bytes = held.map(|weight| {
        let each = if matches!(weight.region, Region::Vector { .. }) { 4 } else { storage.weight };
        (weight.region.elements() * each) as u64
    });
    bytes.sum()
}

fn names(lowered: &Lowered, weights: &[WeightId]) -> String {
    let held: Vec<_> = weights.iter().filter_map(|id| lowered.weights[id.0].as_ref()).collect();
    match held.as_slice() {
        [] => String::new(),
        [one] => one.name.clone(),
        [first, .., last] => format!("{} .. {} ({})", first.name, last.name, held.len()),
    }
}

/// Indices of body ops to print; where a stretch repeats right after itself it is printed once,
/// and its last index carries (length, further times).
fn fold_layers(body: &[Op], lowered: &Lowered) -> Vec<(usize, Option<(usize, usize)>)> {
    let shape: Vec<_> = body
        .iter()
        .map(|op| {
            let uses = op.uses();
            let widths: Vec<_> = uses
                .reads
                .iter()
                .chain(&uses.writes)
                .map(|id| lowered.buffers[id.0].per_token())
                .collect();
            (op.name(), widths, op.weights().len())
        })
        .collect();
    let mut shown = Vec::new();
    let mut at = 0;
    while at < body.len() {
        let remaining = body.len() - at;
        let period = (4..=remaining / 2).find(|&n| shape[at..at + n] == shape[at + n..at + 2 * n]);
        let Some(period) = period else {
            shown.push((at, None));
            at += 1;
            continue;
        };
        let stretch = &shape[at..at + period];
        let times = shape[at..].chunks(period).take_while(|next| next == &stretch).count();
        shown.extend((at..at + period).map(|i| (i, None)));
        if let Some(last) = shown.last_mut() {
            last.1 = Some((period, times - 1));
        }
        at += period * times;
    }
    shown
}

fn totals(text: &mut String, lowered: &Lowered, storage: Storage) {
    let weights = weight_bytes(lowered, |_| storage.weight);
    let replicas = replica_bytes(lowered, |_| storage.weight);
    let _ = writeln!(text, "\nweights          {weights:>16} bytes");
    if lowered.mesh.world() > 1 {
        let _ = writeln!(text, "  on other ranks {replicas:>16} bytes, replicated");
    }
    for (number, group) in lowered.groups.iter().enumerate() {
        let kind = match group.kind {
            CacheKind::Full => "keys and values".to_owned(),
            CacheKind::Latent => "latents, the same on every tp rank".to_owned(),
            CacheKind::Sliding { window } => format!("keys and values, window {window}"),
        };
        let bytes = block_bytes(group, storage.cache);
        let layers = group.layers.len();
        let _ = writeln!(
            text,
            "kv group {number}       {bytes:>16} bytes a block of 64 tokens ({kind}, {layers} layers)"
        );
    }
    let activations = activation_bytes(lowered, lowered.bucket, lowered.bucket);
    let _ = writeln!(text, "activations      {activations:>16} bytes at this bucket");
    for axis in [Axis::Dp, Axis::Tp] {
        let on_axis = |op: &&Op| match op {
            Op::AllReduce { axis: a, .. }
            | Op::AllGather { axis: a, .. }
            | Op::ReduceScatter { axis: a, .. } => *a == axis,
            _ => false,
        };
        let ops = lowered.body.iter().chain(&lowered.head).filter(on_axis);
        let (count, bytes) = ops.fold((0_usize, 0_u64), |(count, bytes), op| {
            (count + 1, bytes + collective_bytes(lowered, op).0)
        });
        if count > 0 {
            let _ =
                writeln!(text, "collectives {axis}   {bytes:>16} bytes sent a step ({count} ops)");
        }
    }
}

#[cfg(test)]
mod tests;
