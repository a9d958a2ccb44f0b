//! Shards of one worker group: in step with each other, each request where it is served best, whoever must
//! run alone alone in the whole group, and no token told that a rank disagrees about.

use ids::{Rank, RequestId, ShardId, TenantId, TokenId, Tokens};
use scheduler::{Config, FinishReason, Placement, Refusal, Submit, Why};
use sim::group::Group;
use sim::replica::{limits, request};
use step::Mesh;

fn mesh(dp: u32, tp: u32) -> Mesh {
    Mesh { dp, tp, expert_parallel: false }
}

/// A request whose prompt nobody else has.
fn own(id: u64, prompt: u32, output: u32) -> Submit {
    let base = request(id, prompt, output);
    let mut tokens = base.prompt.to_vec();
    for (i, token) in tokens.iter_mut().enumerate() {
        *token = TokenId(1 + (token.0 * 13 + id as u32 * 29 + i as u32 / 7) % 96);
    }
    with_prompt(base, tokens)
}

fn with_prompt(base: Submit, tokens: Vec<TokenId>) -> Submit {
    let key = limits().hash_key;
    Submit {
        prompt_hashes: key.chain_all(base.root, &tokens).into(),
        prompt: tokens.into(),
        ..base
    }
}

fn placed(group: &Group, id: u64) -> &Placement {
    let found = group.placements.iter().find(|placement| placement.request == RequestId(id));
    found.expect("it was placed")
}

fn fine(done: Result<(), String>) {
    if let Err(what) = done {
        panic!("{what}");
    }
}

/// Lets those who were placed get their seats.
fn some_steps(group: &mut Group, shards: u32) {
    for rank in mesh(shards, 1).ranks() {
        group.arrive(rank, |_| ()).expect("right").expect("agreed");
    }
}

#[test]
fn shards_with_work_are_in_every_step_together() {
    let mut group = Group::of(mesh(2, 1)).expect("a group");
    for id in 1..=8 {
        fine(group.submit(own(id, 40 + id as u32, 60)));
    }
    fine(group.drive(|_| Ok(())));
    assert_eq!(group.ends.len(), 8);
    let both = group.steps.iter().filter(|tokens| tokens.iter().all(|n| !n.is_zero())).count();
    // They are four and four, of one length: at the ends alone one shard is without work.
    assert!(both + 6 >= group.steps.len(), "{both} of {} steps", group.steps.len());
    // Each shard decodes once in a step, so a token of all eight takes a step, not two.
    assert!(group.steps.len() < 80, "{} steps for 60 tokens each", group.steps.len());
}

#[test]
fn a_shard_without_work_takes_part() {
    let mut group = Group::of(mesh(3, 2)).expect("a group");
    fine(group.submit(own(1, 100, 20)));
    fine(group.drive(|_| Ok(())));
    assert!(group.steps.iter().all(|tokens| tokens.len() == 3 && tokens[1..] == [Tokens(0); 2]));
    assert_eq!(group.ends[&RequestId(1)], FinishReason::Length);
}

#[test]
fn what_comes_late_joins_the_steps_of_others() {
    let mut group = Group::of(mesh(2, 1)).expect("a group");
    fine(group.submit(own(1, 40, 200)));
    let mut steps = 0;
    fine(group.drive(|group| {
        steps += 1;
        // At another depth of the first shard's steps in flight each time.
        if steps % 7 == 0 && steps < 60 {
            group.submit(own(1 + steps, 40, 12))?;
        }
        Ok(())
    }));
    // The first request alone needs as many steps as it has tokens; the others run beside it.
    assert!(group.steps.len() <= 200 + 12, "{} steps", group.steps.len());
}

/// Behind a long chunk nobody is planned ahead, in no shard: alone, a shard would be a step ahead for ever.
#[test]
fn a_long_prompt_in_one_shard_does_not_part_the_others_steps_from_its_own() {
    let config = Config { max_chunk: Tokens(600), ..limits() };
    let mut group = Group::new(mesh(2, 1), &config, 128).expect("a group");
    fine(group.submit(own(1, 3600, 20)));
    fine(group.submit(own(2, 30, 40)));
    fine(group.drive(|_| Ok(())));
    assert_ne!(placed(&group, 1).shard, placed(&group, 2).shard);
    // Six chunks and twenty tokens beside forty tokens; the first step came before the second request.
    let prompt = placed(&group, 1).shard.index();
    let busy = group.steps.iter().filter(|tokens| !tokens[prompt].is_zero()).count();
    let apart = group.steps[1..].iter().take_while(|tokens| !tokens[prompt].is_zero()).count();
    assert_eq!(busy, apart + 1, "the prompt's shard is in every step until it is done");
}

#[test]
fn a_prompt_weighs_until_it_is_computed_and_not_longer() {
    let mut group = Group::new(mesh(2, 1), &limits(), 128).expect("a group");
    fine(group.submit(own(1, 3000, 400)));
    let long = placed(&group, 1).shard;
    fine(group.submit(own(2, 30, 400)));
    assert_ne!(placed(&group, 2).shard, long, "three thousand tokens are to be computed there");
    for _ in 0..40 {
        for rank in mesh(2, 1).ranks() {
            group.arrive(rank, |_| ()).expect("right").expect("agreed");
        }
    }
    for id in 3..=8 {
        fine(group.submit(own(id, 30, 100)));
    }
    let there = (3..=8).filter(|id| placed(&group, *id).shard == long).count();
    assert_eq!(there, 3, "every other one");
    fine(group.drive(|_| Ok(())));
}

#[test]
fn a_conversation_stays_where_its_prefix_is_until_that_is_too_busy() {
    let config = Config { max_running: 64, ..limits() };
    let mut group = Group::new(mesh(2, 1), &config, 256).expect("a group");
    fine(group.submit(own(1, 640, 4)));
    fine(group.submit(own(2, 640, 4)));
    fine(group.drive(|_| Ok(())));
    assert_ne!(placed(&group, 1).shard, placed(&group, 2).shard, "equals in turn");
    for (id, of) in [(3, 1), (4, 2), (5, 2), (6, 1)] {
        let mut tokens = own(of, 640, 4).prompt.to_vec();
        tokens.extend((0..40).map(|i| TokenId(1 + (i + id as u32) % 90)));
        fine(group.submit(with_prompt(request(id, 1, 4), tokens)));
        fine(group.drive(|_| Ok(())));
        assert_eq!(placed(&group, id).shard, placed(&group, of).shard);
        assert_eq!(placed(&group, id).why, Why::Prefix);
        let hit = placed(&group, id).weighed[placed(&group, of).shard.index()].hit;
        assert_eq!(hit, Tokens(640), "all of the first turn's prompt");
    }
    // Twelve others keep its shard busy: more than its prefix has blocks.
    let (busy, idle) = (placed(&group, 1).shard, placed(&group, 2).shard);
    for id in 10..34 {
        fine(group.submit(own(id, 30, 100)));
    }
    let idlers: Vec<RequestId> = group
        .placements
        .iter()
        .filter(|p| p.request.0 >= 10)
        .filter(|p| p.shard == idle)
        .map(|p| p.request)
        .collect();
    assert_eq!(idlers.len(), 12, "load is spread evenly");
    for request in idlers {
        fine(group.abort(request));
    }
    let again = own(1, 640, 4).prompt.to_vec();
    fine(group.submit(with_prompt(request(99, 1, 4), again)));
    assert_eq!((placed(&group, 99).shard, placed(&group, 99).why), (idle, Why::LoadOverPrefix));
    assert_ne!(busy, idle);
    fine(group.drive(|_| Ok(())));
}

#[test]
fn what_may_wait_is_bounded_over_all_shards_together() {
    let config = Config { max_running: 1, queue_requests: 6, ..limits() };
    let mut group = Group::new(mesh(3, 1), &config, 64).expect("a group");
    for id in 1..=30 {
        fine(group.submit(own(id, 20, 10)));
        let gauges = group.shards.gauges();
        assert!(gauges.waiting <= 6, "{} wait", gauges.waiting);
        // None is turned away while there is place in any shard.
        assert!(group.refused.is_empty() || gauges.waiting == 6);
    }
    // At most one runs in each shard, and six wait.
    assert!((21..=23).contains(&group.refused.len()), "{}", group.refused.len());
    fine(group.drive(|_| Ok(())));
    assert_eq!(group.ends.len() + group.refused.len(), 30);
}

#[test]
fn a_request_that_kills_groups_ends_alone_and_takes_nobody_with_it() {
    for (dp, tp) in [(1, 2), (2, 1), (2, 2), (3, 1)] {
        let mut group = Group::of(mesh(dp, tp)).expect("a group");
        for id in 1..=12 {
            fine(group.submit(own(id, 30, 40)));
        }
        let poison = RequestId(5);
        let mut beside = Vec::new();
        fine(group.drive(|group| {
            let seated = group.seated()?;
            if seated.iter().flatten().any(|request| *request == poison)
                && group.clients.contains_key(&poison)
            {
                // Those that have ended hold a slot until their shard's next step.
                let live = |request: &&RequestId| group.clients.contains_key(*request);
                beside.push(seated.iter().flatten().filter(live).count());
                group.die()?;
            }
            Ok(())
        }));
        assert_eq!(beside.len(), 3, "dp {dp} tp {tp}: {beside:?}");
        assert_eq!(beside[2], 1, "dp {dp} tp {tp}: alone in the whole group, {beside:?}");
        assert_eq!(group.ends[&poison], FinishReason::WorkerDied { deaths: 3 });
        let others = group.ends.iter().filter(|(request, _)| **request != poison);
        assert!(others.clone().all(|(_, reason)| *reason == FinishReason::Length), "{others:?}");
        assert_eq!(group.ends.len(), 12);
    }
}

/// Any rank, any step: the group ends before a token of it is told, and its requests go on in the next.
#[test]
fn a_rank_that_disagrees_is_named_before_anything_is_told() {
    for (dp, tp, wrong) in [(1, 2, 0), (1, 2, 1), (2, 2, 3), (2, 2, 2), (1, 4, 2), (3, 1, 1)] {
        for at in [1_u32, 2, 9, 30] {
            for lies_about_a_token in [false, true] {
                let mut group = Group::of(mesh(dp, tp)).expect("a group");
                for id in 1..=6 {
                    fine(group.submit(own(id, 30, 40)));
                }
                let (mut answers, mut found) = (0, None);
                'life: for _ in 0..200 {
                    for rank in mesh(dp, tp).ranks() {
                        let mut lied = false;
                        let arrived = group.arrive(rank, |outcome| {
                            if rank != Rank(wrong) {
                                return;
                            }
                            answers += 1;
                            if answers == at {
                                lied = true;
                                match outcome.sampled.first_mut() {
                                    // Its digest is of what it drew.
                                    Some(sampled) if lies_about_a_token => sampled.token.0 ^= 1,
                                    _ => outcome.digest ^= 4,
                                }
                            }
                        });
                        if let Err(divergence) = arrived.expect("all else is right") {
                            found = Some(divergence);
                            break 'life;
                        }
                    }
                }
                let text = found.expect("noticed").to_string();
                assert!(text.contains(&format!("step {at}: rank {wrong} of shard")), "{text}");
                fine(group.die());
                fine(group.drive(|_| Ok(())));
                assert!(group.ends.values().all(|reason| *reason == FinishReason::Length));
            }
        }
    }
}

#[test]
fn the_shard_of_a_placement_is_where_it_runs() {
    let mut group = Group::of(mesh(4, 1)).expect("a group");
    for id in 1..=8 {
        fine(group.submit(own(id, 50, 5)));
    }
    let seated = group.seated().expect("ranks agree");
    for (shard, requests) in seated.iter().enumerate() {
        for request in requests {
            assert_eq!(placed(&group, request.0).shard, ShardId(shard as u16));
        }
    }
    fine(group.drive(|_| Ok(())));
}

/// One shard of three is full of the least urgent, and more than its share of the queue with it: whoever gives
/// way is found over all shards, wherever the urgent one is put.
#[test]
fn a_full_queue_of_several_shards_gives_way_to_the_urgent() {
    let config = Config { max_running: 1, queue_requests: 6, ..limits() };
    let mut group = Group::new(mesh(3, 1), &config, 64).expect("a group");
    for id in 1..=9 {
        // The first three run, and give way to nobody.
        let priority = [0, 0, 0, 5, 5, 7, 5, 5, 5][id as usize - 1];
        fine(group.submit(Submit { priority, ..own(id, 20, 90) }));
        some_steps(&mut group, 3);
    }
    assert_eq!(group.shards.gauges().waiting, 6);
    let shed = |group: &Group| -> Vec<u64> {
        let shed = group
            .ends
            .iter()
            .filter(|(_, end)| matches!(end, FinishReason::Refused(Refusal::Shed { .. })));
        shed.map(|(request, _)| request.0).collect()
    };
    // The worst class first, then the last to come of what is the worst then, in three shards.
    for (id, gone) in [(20, vec![6]), (21, vec![6, 9]), (22, vec![6, 8, 9])] {
        fine(group.submit(Submit { priority: 1, ..own(id, 20, 90) }));
        assert_eq!(shed(&group), gone);
        assert_eq!(group.shards.gauges().waiting, 6);
    }
    assert!(group.refused.is_empty());
    let homes = [6, 8, 9].map(|id| placed(&group, id).shard);
    assert!(homes.iter().any(|home| *home != homes[0]), "of several shards: {homes:?}");
    // One that is no better than anybody is refused, and no worse one is pushed out for what cannot fit.
    fine(group.submit(Submit { priority: 5, ..own(30, 20, 40) }));
    assert_eq!(group.refused, [RequestId(30)]);
    fine(group.drive(|_| Ok(())));
    assert_eq!(group.ends.len() + group.refused.len(), 13);
}

/// A tenant's requests are counted over all shards: none holds most of any shard's line, one of the queue.
#[test]
fn a_full_queue_of_several_shards_counts_tenants_over_all() {
    let config = Config { max_running: 1, queue_requests: 8, ..limits() };
    let mut group = Group::new(mesh(2, 1), &config, 64).expect("a group");
    let of = |tenant, id| Submit { tenant: TenantId(tenant), ..own(id, 20, 90) };
    // Two run; four of the first and four of others wait.
    for (id, tenant) in
        [(1, 9), (2, 9), (3, 1), (4, 1), (5, 2), (6, 5), (7, 1), (8, 3), (9, 4), (10, 1)]
    {
        fine(group.submit(of(tenant, id)));
        some_steps(&mut group, 2);
    }
    assert_eq!(group.shards.gauges().waiting, 8);
    fine(group.submit(of(2, 11)));
    let ends = |id| group.ends.get(&RequestId(id)).copied();
    assert!(
        matches!(ends(10), Some(FinishReason::Refused(Refusal::Shed { .. }))),
        "{:?}",
        ends(10)
    );
    fine(group.submit(of(1, 12)));
    assert_eq!(group.refused, [RequestId(12)], "it has most itself");
    fine(group.drive(|_| Ok(())));
}
