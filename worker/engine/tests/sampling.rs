//! Sampling through the engine: what belongs to one request stays with it.

mod common;

use common::{Model, Setup, families, greedy, prompt};
use engine::{WeightError, WeightSource};
use ids::{TokenId, Tokens};
use ops::{Matrix, WeightSlice};
use std::borrow::Cow;
use step::{SampleFault, Sampling};
use weights::Weights;

/// Weights whose embedding of one token is NaN.
struct Poisoned {
    weights: &'static Weights,
    table: Vec<f32>,
}

const POISON: u32 = 40;

impl WeightSource for Poisoned {
    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix<'_>, WeightError> {
        if name == "model.embed_tokens.weight" {
            return Ok(Matrix::new(WeightSlice::F32(&self.table), rows, cols));
        }
        self.weights.matrix(name, rows, cols)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Cow<'_, [f32]>, WeightError> {
        self.weights.vector(name, len)
    }
}

#[test]
fn a_nan_ends_one_request_and_leaves_its_batch_mates_alone() {
    for (name, config) in families() {
        if name.contains("tied") {
            // There the poisoned row is a row of the head too, and every request holds it.
            continue;
        }
        let model = Model::new(&config, 2);
        let hidden = model.config.decoder().hidden;
        let mut table =
            model.weights.get("model.embed_tokens.weight").expect("a table").data.to_f32();
        table[POISON as usize * hidden..][..hidden].fill(f32::NAN);
        let poisoned: &'static Poisoned =
            Box::leak(Box::new(Poisoned { weights: model.weights, table }));
        let clean: Vec<u32> =
            prompt(80, 1).into_iter().map(|t| if t == POISON { 1 } else { t }).collect();
        let mut bad = clean.clone();
        bad[30] = POISON;

        let run = |with_bad: bool| {
            let mut session = model.session_over(poisoned, Setup::default());
            session.admit(0, &clean, 80, greedy());
            session.admit(1, if with_bad { &bad } else { &clean }, 80, greedy());
            let outcome = session.step(&[(0, 80), (1, 80)]);
            outcome.sampled
        };
        let sampled = run(true);
        assert_eq!(sampled[1].fault, Some(SampleFault::NotANumber), "{name}");
        // Which kernel an expert runs on depends on how many rows chose it, hence the rounding.
        let (mate, clean) = (&sampled[0], &run(false)[0]);
        assert_eq!((mate.token, mate.fault), (clean.token, None), "{name}");
        let logprob = |sampled: &step::Sampled| sampled.logprobs.as_ref().map(|l| l.chosen.logprob);
        let apart = logprob(mate).zip(logprob(clean)).map(|(a, b)| (a - b).abs());
        assert!(apart.is_some_and(|apart| apart < 1e-5), "{name}: {apart:?}");
    }
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
