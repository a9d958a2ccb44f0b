//! What runs did, in numbers that can be added up.
//!
//! It judges nothing. Invariant: every figure was counted where it happened.

use crate::coverage::Coverage;
use core::time::Duration;
use ids::Timestamp;
use scheduler::{Gauges, Unfit};

/// What can go wrong between the scheduler and its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// An outcome comes long after it should.
    Late,
    /// An outcome never comes.
    Lost,
    /// An outcome comes again.
    Repeated,
    /// An outcome comes before that of the step before.
    Reordered,
    /// An outcome lacks a sample or names a slot's other life.
    Contradicting,
    /// An outcome of a step that was never sent.
    UnknownStep,
    /// The bytes of an outcome break off.
    Garbled,
    /// No token can be drawn for a request.
    Sample,
    /// From this step on nothing is answered.
    Hung,
    /// The worker dies while the step runs.
    Death,
    /// A rank vouches for other commands than it was told.
    Digest,
}

impl Fault {
    /// Every kind, with the word that reports use.
    pub const ALL: [(Self, &'static str); 11] = [
        (Self::Late, "late"),
        (Self::Lost, "lost"),
        (Self::Repeated, "repeated"),
        (Self::Reordered, "reordered"),
        (Self::Contradicting, "contradicting"),
        (Self::UnknownStep, "unknown step"),
        (Self::Garbled, "garbled"),
        (Self::Sample, "sample"),
        (Self::Hung, "hung"),
        (Self::Death, "death"),
        (Self::Digest, "wrong digest"),
    ];
}

/// How a request can end, in the order of [`Figures::ends`].
pub const ENDS: [&str; 6] =
    ["naturally", "by stop string", "aborted", "by deadline", "by deaths", "by fault"];

/// What decided about a placement, in the order of [`Figures::placements`].
pub const PLACED: [&str; 3] = ["prefix", "load", "load over prefix"];

/// What a run, or several, did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    /// Runs added up.
    pub runs: u64,
    /// Of them, with several shards.
    pub several: u64,
    /// Events handled.
    pub events: u64,
    /// Virtual time at the end; of several runs the sum.
    pub time: Timestamp,
    /// Sessions begun.
    pub sessions: u64,
    /// Requests submitted, every turn of a session one.
    pub requests: u64,
    /// Requests turned away.
    pub refused: u64,
    /// Ends by kind, as [`ENDS`] names them.
    pub ends: [u64; ENDS.len()],
    /// Tokens streamed.
    pub tokens: u64,
    /// Steps carried out, each one's plan equal to the model's.
    pub steps: u64,
    /// Outputs said, each equal to the model's.
    pub outputs: u64,
    /// Steps planned while at least 95 % of the cache's blocks were held or cached.
    pub full_cache_steps: u64,
    /// Steps planned while there was memory behind the cache.
    pub tiered_steps: u64,
    /// Those of them in which no place of it was free.
    pub full_tier_steps: u64,
    /// Bytes of plans, uploads and outcomes, encoded and decoded.
    pub wire_bytes: u64,
    /// What went wrong, by [`Fault`].
    pub faults: [u64; Fault::ALL.len()],
    /// Requests put into one of several shards, by [`scheduler::Why`].
    pub placements: [u64; 3],
    /// Times that a shard stood still in a step of others.
    pub still: u64,
    /// Lives that ended because their ranks did not agree.
    pub divergences: u64,
    /// Ended requests whose latency the journal explained.
    pub explained: u64,
    /// Longest time from submission to first admission.
    pub longest_wait: Duration,
    /// The scheduler's own figures at the end.
    pub gauges: Gauges,
    /// Which events met requests in which phase.
    pub coverage: Coverage,
    /// Over every plan and output; of several runs the exclusive or.
    pub digest: u64,
}

impl Figures {
    /// Adds another run's figures.
    pub fn add(&mut self, other: &Self) {
        fn each<const N: usize>(sums: &mut [u64; N], more: &[u64; N]) {
            sums.iter_mut().zip(more).for_each(|(sum, n)| *sum += n);
        }
        self.runs += other.runs;
        self.several += other.several;
        self.still += other.still;
        self.divergences += other.divergences;
        self.explained += other.explained;
        each(&mut self.placements, &other.placements);
        self.events += other.events;
        self.time = Timestamp(self.time.0 + other.time.0);
        self.sessions += other.sessions;
        self.requests += other.requests;
        self.refused += other.refused;
        self.tokens += other.tokens;
        self.steps += other.steps;
        self.outputs += other.outputs;
        self.full_cache_steps += other.full_cache_steps;
        self.tiered_steps += other.tiered_steps;
        self.full_tier_steps += other.full_tier_steps;
        self.wire_bytes += other.wire_bytes;
        each(&mut self.ends, &other.ends);
        each(&mut self.faults, &other.faults);
        self.longest_wait = self.longest_wait.max(other.longest_wait);
        self.coverage.add(&other.coverage);
        self.digest ^= other.digest;
        let (sum, more) = (&mut self.gauges, &other.gauges);
        sum.prefix_query_tokens += more.prefix_query_tokens;
        sum.prefix_hit_tokens += more.prefix_hit_tokens;
        sum.host_hit_tokens += more.host_hit_tokens;
        sum.host_stores += more.host_stores;
        sum.host_loads += more.host_loads;
        sum.preemptions += more.preemptions;
        sum.dropped_tokens += more.dropped_tokens;
        sum.purges += more.purges;
        sum.steps += more.steps;
        sum.deaths += more.deaths;
        each::<{ Unfit::COUNT }>(&mut sum.refused, &more.refused);
    }

    /// Everything as one JSON object, without the version and the machine.
    #[must_use]
    pub fn json(&self) -> String {
        let named = |names: &[&str], values: &[u64]| {
            let each = names.iter().zip(values).map(|(name, n)| format!("\"{name}\":{n}"));
            each.collect::<Vec<_>>().join(",")
        };
        let refusals: Vec<_> = Unfit::ALL.iter().map(|unfit| unfit.label()).collect();
        let g = &self.gauges;
        format!(
            "\"runs\":{},\"events\":{},\"simulated_hours\":{:.2},\"sessions\":{},\"requests\":{},\
             \"refused\":{},\"ends\":{{{}}},\"tokens\":{},\"plans_equal\":{},\"outputs_equal\":{},\
             \"full_cache_steps\":{},\"tiered_steps\":{},\"full_tier_steps\":{},\"tier_stores\":{},\
             \"tier_loads\":{},\"tier_hit_tokens\":{},\"wire_bytes\":{},\"faults\":{{{}}},\"preemptions\":{},\
             \"worker_deaths\":{},\"purges\":{},\"prefix_hit_tokens\":{},\"prefix_query_tokens\":{},\
             \"dropped_tokens\":{},\"events_refused\":{{{}}},\"rarest_cell\":{},\
             \"longest_wait_s\":{:.1},\"runs_of_several_shards\":{},\"placements\":{{{}}},\
             \"stood_still\":{},\"divergences\":{},\"explained\":{}",
            self.runs,
            self.events,
            self.time.0 as f64 / 3.6e12,
            self.sessions,
            self.requests,
            self.refused,
            named(&ENDS, &self.ends),
            self.tokens,
            self.steps,
            self.outputs,
            self.full_cache_steps,
            self.tiered_steps,
            self.full_tier_steps,
            g.host_stores,
            g.host_loads,
            g.host_hit_tokens,
            self.wire_bytes,
            named(&Fault::ALL.map(|(_, name)| name), &self.faults),
            g.preemptions,
            g.deaths,
            g.purges,
            g.prefix_hit_tokens,
            g.prefix_query_tokens,
            g.dropped_tokens,
            named(&refusals, &g.refused),
            self.coverage.rarest(),
            self.longest_wait.as_secs_f64(),
            self.several,
            named(&PLACED, &self.placements),
            self.still,
            self.divergences,
            self.explained,
        )
    }
}
