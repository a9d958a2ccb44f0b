//! However a request is run, its tokens are the same; and each way of running really happened.

use ids::{RequestId, TokenId, Tokens};
use scheduler::{Config, Event, FinishReason, Submit};
use sim::client::Client;
use sim::replica::{Replica, full, limits, request, sliding};
use step::GroupSpec;

const R: RequestId = RequestId(1);

fn shapes() -> Vec<Vec<GroupSpec>> {
    vec![vec![full(0)], vec![sliding(0, 100)], vec![full(0), sliding(1, 65)]]
}

/// The tokens of a request that runs alone, whole, and undisturbed.
fn undisturbed(submit: &Submit, groups: &[GroupSpec]) -> Vec<TokenId> {
    let mut replica = Replica::new(Config { depth: 0, ..limits() }, groups, 64);
    replica.submit(submit.clone());
    replica.drive(|_, _| {});
    replica.told[&submit.request].tokens.clone()
}

#[test]
fn the_oracle_agrees() {
    let submit = request(1, 100, 50);
    let tokens = undisturbed(&submit, &[full(0)]);
    let mut client = Client::new(submit, None);
    tokens.iter().for_each(|token| client.token(*token).expect("the oracle's token"));
    assert_eq!(client.got(), 50);
}

#[test]
fn every_depth_gives_the_same_tokens() {
    for groups in shapes() {
        let want = undisturbed(&request(1, 130, 70), &groups);
        for depth in 0..=2 {
            let mut replica = Replica::new(Config { depth, ..limits() }, &groups, 64);
            replica.submit(request(1, 130, 70));
            replica.plan();
            assert_eq!(replica.reports.len(), depth as usize + 1, "runs that far ahead");
            replica.drive(|_, _| {});
            assert_eq!(replica.told[&R].tokens, want);
        }
    }
}

#[test]
fn every_chunk_size_gives_the_same_tokens() {
    for groups in shapes() {
        let want = undisturbed(&request(1, 300, 10), &groups);
        for chunk in [1, 63, 64, 65] {
            let config = Config { max_chunk: Tokens(chunk), ..limits() };
            let mut replica = Replica::new(config, &groups, 64);
            replica.submit(request(1, 300, 10));
            replica.drive(|_, _| {});
            assert_eq!(replica.told[&R].tokens, want);
            let chunks = replica.reports.iter().filter(|report| report.chunks > 0).count();
            assert_eq!(chunks, 300_usize.div_ceil(chunk as usize));
        }
    }
}

#[test]
fn a_prefix_hit_gives_the_same_tokens() {
    for groups in shapes() {
        for (prompt, cached) in [(63, 0), (64, 0), (65, 64), (128, 64), (200, 192)] {
            let want = undisturbed(&request(1, prompt, 20), &groups);
            let mut replica = Replica::new(limits(), &groups, 64);
            replica.submit(request(1, prompt, 20));
            replica.drive(|_, _| {});
            replica.submit(request(2, prompt, 20));
            replica.drive(|_, _| {});
            let told = &replica.told[&RequestId(2)];
            assert_eq!(told.cached, Some(Tokens(cached)), "{prompt} tokens, {groups:?}");
            assert_eq!(told.tokens, want);
        }
    }
}

#[test]
fn output_blocks_are_hit_by_the_next_turn() {
    let mut replica = Replica::new(limits(), &[full(0)], 64);
    let first = request(1, 100, 100);
    replica.submit(first.clone());
    replica.drive(|_, _| {});
    let mut turn: Vec<_> = first.prompt.to_vec();
    turn.extend(&replica.told[&R].tokens);
    turn.push(TokenId(3));
    let hashes = replica.scheduler.config().hash_key.chain_all(first.root, &turn);
    let next = Submit { prompt: turn.into(), prompt_hashes: hashes.into(), ..request(2, 1, 5) };
    replica.submit(next);
    replica.drive(|_, _| {});
    // The last output token was never run, so 199 of 200 tokens have KV: three blocks.
    assert_eq!(replica.told[&RequestId(2)].cached, Some(Tokens(192)));
}

#[test]
fn preemption_at_every_step_gives_the_same_tokens() {
    for groups in shapes() {
        for (depth, caching) in [(0, true), (1, true), (2, true), (2, false)] {
            let config =
                Config { depth, prefix_caching: caching, max_chunk: Tokens(50), ..limits() };
            let want = undisturbed(&request(1, 150, 40), &groups);
            let mut steps = 0;
            loop {
                let mut replica = Replica::new(config.clone(), &groups, 64);
                replica.submit(request(1, 150, 40));
                replica.drive(|replica, step| {
                    if step == steps {
                        replica.handle(Event::ForcePreempt(R));
                    }
                });
                assert_eq!(replica.told[&R].tokens, want, "preempted at step {steps}");
                if replica.scheduler.gauges().preemptions == 0 {
                    break;
                }
                steps += 1;
            }
            assert!(steps >= 40, "preempted at {steps} steps");
        }
    }
}

#[test]
fn a_batch_gives_each_its_own_tokens_in_a_cache_too_small_for_all() {
    for groups in shapes() {
        for depth in 0..=2 {
            let mut replica = Replica::new(Config { depth, ..limits() }, &groups, 14);
            for id in 1..=8 {
                replica.submit(request(id, 20 + 25 * id as u32, 90));
            }
            replica.drive(|_, _| {});
            for id in 1..=8 {
                let want = undisturbed(&request(id, 20 + 25 * id as u32, 90), &groups);
                assert_eq!(replica.told[&RequestId(id)].tokens, want, "request {id}");
            }
        }
    }
    let mut replica = Replica::new(limits(), &[full(0)], 14);
    for id in 1..=8 {
        replica.submit(request(id, 60, 120));
    }
    replica.drive(|_, _| {});
    assert!(replica.scheduler.gauges().preemptions > 0, "the cache was too small");
}

#[test]
fn a_worker_death_at_every_step_gives_the_same_tokens() {
    let want = undisturbed(&request(1, 150, 20), &[full(0)]);
    for at in 0..24 {
        let mut replica =
            Replica::new(Config { max_chunk: Tokens(50), ..limits() }, &[full(0)], 64);
        replica.submit(request(1, 150, 20));
        replica.drive(|replica, step| {
            if step == at {
                replica.die();
            }
        });
        assert_eq!(replica.told[&R].tokens, want, "died at step {at}");
        assert_eq!(replica.told[&R].end.map(|end| end.0), Some(FinishReason::Length));
    }
}
