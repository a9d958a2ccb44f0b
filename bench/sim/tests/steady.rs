//! A step in which nobody comes or goes takes no memory, however long the contexts and the line.
//!
//! Alone in its program, because it counts every allocation of its thread.

use core::time::Duration;
use ids::{
    BlockHash, Bytes, GroupId, HashKey, Incarnation, RequestId, TenantId, Timestamp, TokenId,
    Tokens,
};
use kv_cache::{KvCache, carve};
use scheduler::{Config, Event, Joined, PlanReport, Planned, Shards, Submit, WorkerReady};
use sim::echo::Echo;
use sim::planner_bench::{Case, Kind, measure};
use std::sync::Arc;
use step::{Carving, GroupKind, GroupSpec, StepPlan};

/// Runs and gives the number of allocations as so many microseconds.
fn allocations(run: &mut dyn FnMut()) -> Duration {
    Duration::from_micros(allocation_counter::measure(run).count_total)
}

#[test]
fn a_steady_step_takes_no_memory() {
    for kind in [Kind::Steady, Kind::Line] {
        for (requests, context) in [(16, 1000), (256, 1000), (64, 20_000)] {
            let case = Case { requests, context: Tokens(context), kind, steps: 600 };
            let counted = measure(case, allocations, |_| ()).expect("measures");
            assert_eq!(counted.mean_us, 0.0, "{case:?}: {counted:?}");
        }
    }
}

#[test]
fn what_goes_behind_the_cache_takes_no_memory() {
    let group = GroupId(0);
    let spec = GroupSpec { group, kind: GroupKind::Full, block_bytes: Bytes(64) };
    let carving = carve(&[spec], Bytes(64 * 32), Bytes(64)).expect("a cache");
    let mut cache = KvCache::new(&[spec], &Carving { host_blocks: 50, ..carving });
    let mut ops = Vec::new();
    // Each block takes the place of one that is stored over one that was stored before.
    let mut round = |n: u128| {
        ops.clear();
        for i in 0..32 {
            let block = cache.mint(group).expect("evicts");
            let block = cache.seal(block, BlockHash(n << 64 | i));
            cache.release(block);
        }
        cache.take_copies(&mut ops);
        ops.len()
    };
    let mut stored = (0..8).map(&mut round).sum();
    assert_eq!(stored, 7 * 32);
    let counted = allocation_counter::measure(|| stored = round(8));
    assert_eq!((stored, counted.count_total), (32, 0));
}

#[test]
fn the_count_counts() {
    // Who comes is given tables and a row, and is answered.
    let case = Case { requests: 16, context: Tokens(1000), kind: Kind::Churn, steps: 100 };
    let counted = measure(case, allocations, |_| ()).expect("measures");
    assert!(counted.mean_us > 3.0, "{counted:?}");
}

/// Shards with the smallest worker each, and the steps they answered.
struct Group {
    shards: Shards,
    workers: Vec<Echo>,
    decoding: u32,
}

impl Group {
    fn new(shards: u32, each: u64, context: u32) -> Self {
        let spec = GroupSpec { group: GroupId(0), kind: GroupKind::Full, block_bytes: Bytes(64) };
        let blocks = (each + 8) * u64::from(context / 64 + 40);
        let carving = carve(&[spec], Bytes(64 * blocks), Bytes(64)).expect("a cache");
        let key = HashKey::derive("steady", b"");
        let (max_running, root) = (each as u32, key.root(b""));
        let config = Config { max_running, queue_tokens: u64::MAX / 2, ..Config::serving(key) };
        let mut group = Shards::new(&config, shards).expect("limits that agree");
        let ready = WorkerReady { incarnation: Incarnation(1), groups: vec![spec], carving };
        group.handle(Timestamp::ZERO, Event::WorkerReady(Box::new(ready)));
        for request in 0..u64::from(shards) * each {
            // Lengths differ, so that blocks end in every step, and nothing is shared.
            let len = context - (request % 64) as u32;
            let first = TokenId(1_000_000 + request as u32);
            let prompt: Arc<[_]> = [first].into_iter().chain((1..len).map(TokenId)).collect();
            let submit = Submit {
                request: RequestId(request),
                prompt_hashes: config.hash_key.chain_all(root, &prompt).into(),
                prompt,
                root,
                sampling: Arc::default(),
                max_tokens: Tokens(2000),
                end_tokens: [].into(),
                ignore_eos: true,
                stop_tokens: [].into(),
                prompt_logprobs: None,
                priority: 0,
                tenant: TenantId(request % 8),
                deadline: None,
                arrival: Timestamp(request),
            };
            group.handle(Timestamp::ZERO, Event::Submit(Box::new(submit)));
        }
        while group.poll_placement().is_some() {}
        let workers = (0..shards).map(|_| Echo::default()).collect();
        Self { shards: group, workers, decoding: 0 }
    }

    /// Carries a step out in every shard.
    fn carry_out(&mut self, planned: Planned) {
        let Planned { plan, report } = planned;
        self.decoding = report.decode;
        for (at, worker) in self.workers.iter_mut().enumerate() {
            let prefill_tokens = plan.sections[at].prefill.iter().map(|run| run.tokens).sum();
            let own = Planned {
                plan: StepPlan {
                    sections: vec![plan.sections[at].clone()],
                    shard_tokens: vec![plan.shard_tokens[at]],
                    ..plan
                },
                report: PlanReport { prefill_tokens, ..report },
            };
            worker.step(&own, 10_000_000, |_| TokenId(1));
        }
        self.shards.recycle(plan);
    }

    fn answer(&mut self) -> Option<Joined> {
        let outcomes: Option<Vec<_>> =
            self.workers.iter_mut().map(|worker| worker.outcomes.pop_front()).collect();
        let outcomes = outcomes?;
        let (seq, incarnation) = (outcomes[0].seq, outcomes[0].incarnation);
        Some(Joined { seq, incarnation, outcomes })
    }

    /// Takes a result and plans the next step, as often as there is one.
    fn turn(&mut self, now: Timestamp, joined: Option<Joined>) -> Option<Planned> {
        joined.into_iter().for_each(|joined| self.shards.retire(now, joined));
        while self.shards.poll_output().is_some() {}
        let planned = self.shards.plan_step(now);
        while self.shards.poll_output().is_some() {}
        planned
    }
}

#[test]
fn a_steady_step_of_several_shards_takes_no_memory() {
    for (shards, each, context) in [(2, 16, 1000), (4, 16, 1000), (2, 128, 700), (4, 8, 8000)] {
        let mut group = Group::new(shards, each, context);
        let (mut now, mut steady) = (Timestamp::ZERO, 0_u32);
        let (mut counted, mut steps) = (0, 0);
        while steps < 400 {
            now = now.after(Duration::from_millis(10));
            let (mut joined, mut planned) = (group.answer(), None);
            let turn = allocation_counter::measure(|| planned = group.turn(now, joined.take()));
            // The last prompts' outcomes are in, and each request took a few blocks.
            if steady > 200 {
                counted += turn.count_total;
                steps += 1;
            }
            let Some(planned) = planned else { continue };
            group.carry_out(planned);
            steady += u32::from(group.decoding == shards * each as u32);
            assert!(now < Timestamp::ZERO.after(Duration::from_secs(60)), "not steady");
        }
        assert_eq!(counted, 0, "{shards} shards of {each} requests, {context} tokens each");
    }
}
