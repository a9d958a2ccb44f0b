//! Sampling through the engine: what belongs to one request stays with it.

mod common;

use common::{Model, Setup, families, greedy, prompt};
use ids::{TokenId, Tokens};
use step::Sampling;

#[test]
fn a_nan_ends_one_request_and_leaves_its_batch_mates_alone() {
    common::poison::a_nan_ends_one_request(Setup::default(), 1, false);
}

fn outputs(sampling: Sampling) -> Vec<u32> {
    let (_, config) = families().remove(0);
    let model = Model::new(&config, 21);
    model.session(Setup::default()).complete(&prompt(20, 5), 64, 10, sampling).tokens
}

#[test]
fn bias_bans_and_penalties_reach_the_sampler() {
    let plain = outputs(greedy());
    let rare = (0..97).find(|token| !plain.contains(token)).expect("ten tokens of 97");
    let biased = Sampling { logit_bias: [(TokenId(rare), 100.0)].into(), ..greedy() };
    assert_eq!(outputs(biased), [rare; 10]);
    // Banned for the first four tokens, then free.
    let banned = Sampling {
        logit_bias: [(TokenId(rare), 100.0)].into(),
        banned_before_min: [TokenId(rare)].into(),
        min_tokens: Tokens(4),
        ..greedy()
    };
    let got = outputs(banned);
    assert!(!got[..4].contains(&rare) && got[4..] == [rare; 6], "{got:?}");
    // A bias that a few occurrences outweigh.
    let once = Sampling {
        logit_bias: [(TokenId(rare), 14.0)].into(),
        presence_penalty: 2.0,
        frequency_penalty: 2.0,
        repetition_penalty: 10.0,
        ..greedy()
    };
    let count = outputs(once).iter().filter(|token| **token == rare).count();
    assert!((1..10).contains(&count), "{count}");
}

#[test]
fn log_probabilities_are_of_the_raw_logits_with_ranks() {
    let (_, config) = families().remove(0);
    let model = Model::new(&config, 21);
    let run = |sampling: Sampling| {
        let mut session = model.session(Setup::default());
        session.admit(0, &prompt(20, 5), 20, sampling);
        session.step(&[(0, 20)]).sampled.remove(0).logprobs.expect("asked for")
    };
    let plain = run(greedy());
    assert_eq!(plain.chosen.rank, 1);
    assert_eq!(plain.top.len(), 3);
    assert_eq!(plain.top[0], plain.chosen);
    let biased = run(Sampling { logit_bias: [(TokenId(33), 100.0)].into(), ..greedy() });
    assert_eq!(biased.top, plain.top);
    assert!(biased.chosen.token == TokenId(33) && biased.chosen.rank > 1);
}
