//! Figures of several shards as one: counts are added, what all of them have in common is taken once.
//!
//! Every field is named, so that a new one has to say which it is.

use crate::report::{Gauges, PlanReport};

/// Adds a shard's figures. Shares of caches are added too; whoever adds divides them.
pub(super) fn gauges(all: &mut Gauges, one: &Gauges) {
    let Gauges {
        running,
        waiting,
        queued_tokens,
        cache_usage,
        prefix_query_tokens,
        prefix_hit_tokens,
        preemptions,
        dropped_tokens,
        purges,
        steps,
        deaths,
        refused,
    } = one;
    all.running += running;
    all.waiting += waiting;
    all.queued_tokens += queued_tokens;
    all.cache_usage += cache_usage;
    all.prefix_query_tokens += prefix_query_tokens;
    all.prefix_hit_tokens += prefix_hit_tokens;
    all.preemptions += preemptions;
    all.dropped_tokens += dropped_tokens;
    all.purges += purges;
    all.steps += steps;
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
    all.decode += decode;
    all.chunks += chunks;
    all.prefill_tokens += *prefill_tokens;
    all.admitted += admitted;
    all.preempted += preempted;
    all.stalled += stalled;
    all.running += running;
    all.waiting += waiting;
    all.head = all.head.or(*head);
    // The slowest shard is what the others wait for.
    all.predicted = all.predicted.max(*predicted);
    all.cache_usage = all.cache_usage.max(*cache_usage);
}
