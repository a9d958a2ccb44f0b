//! Figures of several shards as one: counts are added, what all of them have in common is taken once.
//!
//! Every field is named, so that a new one has to say which it is.

use crate::report::{Gauges, PlanReport};

macro_rules! add {
    ($all:ident: $($field:ident),+) => { $($all.$field += *$field;)+ };
}

/// Adds a shard's figures. Shares of caches are added too; whoever adds divides them.
pub(super) fn gauges(all: &mut Gauges, one: &Gauges) {
    let Gauges {
        running,
        waiting,
        queued,
        queued_tokens,
        cache_usage,
        prefix_query_tokens,
        prefix_hit_tokens,
        host_hit_tokens,
        host_blocks,
        host_room,
        host_stores,
        host_loads,
        preemptions,
        dropped_tokens,
        purges,
        steps,
        shed,
        unreachable,
        overdue,
        deaths,
        refused,
    } = one;
    add!(all: running, waiting, queued, queued_tokens, cache_usage, prefix_query_tokens);
    add!(all: prefix_hit_tokens, preemptions, dropped_tokens, purges, steps, shed, unreachable, overdue);
    add!(all: host_hit_tokens, host_blocks, host_room, host_stores, host_loads);
    // A death is the whole group's.
    all.deaths = all.deaths.max(*deaths);
    for (sum, count) in all.refused.iter_mut().zip(refused) {
        *sum += count;
    }
}

/// Adds what a shard does in a step that several take part in.
pub(super) fn reports(all: &mut PlanReport, one: &PlanReport) {
    let PlanReport {
        seq: _,
        ahead: _,
        decode,
        chunks,
        prefill_tokens,
        admitted,
        preempted,
        stalled,
        running,
        waiting,
        head,
        predicted,
        cache_usage,
    } = one;
    add!(all: decode, chunks, prefill_tokens, admitted, preempted, stalled, running, waiting);
    all.head = all.head.or(*head);
    // The slowest shard is what the others wait for.
    all.predicted = all.predicted.max(*predicted);
    all.cache_usage = all.cache_usage.max(*cache_usage);
}
