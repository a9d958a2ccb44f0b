//! NaN in one request's activations and cache.

use super::{Model, Setup, families, greedy, native, prompt};
use engine::{WeightError, WeightSource};
use ids::TokenId;
use ops::{Matrix, WeightSlice};
use std::borrow::Cow;
use step::{Logprobs, Outcome, SampleFault, Sampling};
use weights::Weights;

/// Weights whose embedding of one token is NaN.
struct Poisoned {
    weights: &'static Weights,
    table: Vec<f32>,
}

/// The token whose embedding it is.
pub const POISON: u32 = 40;

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

/// The model's weights with a row of NaN.
pub fn source(model: &Model) -> &'static dyn WeightSource {
    let hidden = model.config.decoder().hidden;
    let mut table = model.weights.get("model.embed_tokens.weight").expect("a table").data.to_f32();
    table[POISON as usize * hidden..][..hidden].fill(f32::NAN);
    Box::leak(Box::new(Poisoned { weights: model.weights, table }))
}

/// The same, a prompt without that token, and one with it.
fn poisoned(model: &Model) -> (&'static dyn WeightSource, Vec<u32>, Vec<u32>) {
    let poisoned = source(model);
    let clean = prompt(80, 1).into_iter().map(|t| if t == POISON { 1 } else { t });
    let clean: Vec<u32> = clean.collect();
    let mut bad = clean.clone();
    bad[30] = POISON;
    (poisoned, clean, bad)
}

/// What came back for one slot of a step, to the bit.
fn of_slot(outcome: &Outcome, request: u64, slot: u32) -> (Vec<u32>, Vec<u32>, bool) {
    let sampled = outcome.sampled.iter().filter(|one| one.slot.0 == slot);
    let bits = |logprobs: &Logprobs| -> Vec<u32> {
        let all = std::iter::once(&logprobs.chosen).chain(&logprobs.top);
        all.flat_map(|one| [one.token.0, one.logprob.to_bits()]).collect()
    };
    let mut drawn = Vec::new();
    let mut faulty = false;
    for one in sampled {
        faulty |= one.fault.is_some();
        drawn.push(one.token.0);
        drawn.extend(one.logprobs.iter().flat_map(|logprobs| bits(logprobs)));
    }
    let parts = outcome.prompt_logprobs.iter().filter(|part| part.request.0 == request);
    (drawn, parts.flat_map(|part| part.entries.iter().flat_map(bits)).collect(), faulty)
}

/// A NaN in one request's activations and cache ends it; its `mates` get what they get in a run
/// without it, through the step with the prompts and decodes behind it. So does who takes its blocks
/// afterwards, with NaN in all that it does not write itself.
///
/// To the bit, or where which kernel an expert runs on depends on how many rows chose it, as on the
/// processor, within rounding.
pub fn a_nan_ends_one_request(base: Setup, mates: u32, exact: bool) {
    for (name, config) in families().into_iter().chain(native()) {
        if name.contains("tied") {
            // There the poisoned row is a row of the head too, and every request holds it.
            continue;
        }
        let model = Model::new(&config, 2);
        let (poisoned, clean, bad) = poisoned(&model);
        let mut session = model.session_over(poisoned, base);
        // Nobody else draws the token.
        let likeliest = Sampling { logit_bias: [(TokenId(POISON), -1e4)].into(), ..greedy() };
        // The bad one lies between the others.
        let place = mates / 2;
        let length = |slot: u32| if slot == place { 80 } else { 80 - slot % 40 };
        let mut run = |with_bad: bool| {
            let first = u64::from(session.generations) + 1;
            for slot in 0..=mates {
                let all = if slot == place && with_bad { &bad } else { &clean };
                let tokens = &all[..length(slot) as usize];
                session.admit(slot, tokens, tokens.len(), likeliest.clone());
            }
            let chunks: Vec<_> = (0..=mates).map(|slot| (slot, length(slot))).collect();
            let mut outcomes = vec![session.step(&chunks)];
            outcomes.extend((0..3).map(|_| session.step(&[])));
            // Whoever comes next takes the blocks of who left last.
            (0..=mates).filter(|slot| *slot != place).for_each(|slot| session.retire(slot));
            session.retire(place);
            session.admit(place, &clean[..70], 70, likeliest.clone());
            outcomes.push(session.step(&[(place, 70)]));
            outcomes.push(session.step(&[]));
            session.retire(place);
            let results = outcomes.iter().enumerate().map(|(step, outcome)| {
                (0..=mates)
                    .map(|slot| {
                        let after = if step < 4 { slot } else { mates + 1 };
                        of_slot(outcome, first + u64::from(after), slot)
                    })
                    .collect::<Vec<_>>()
            });
            results.collect::<Vec<_>>()
        };
        let without = run(false);
        let with = run(true);
        for (step, (with, without)) in with.iter().zip(&without).enumerate() {
            for slot in 0..=mates {
                let (got, expected) = (&with[slot as usize], &without[slot as usize]);
                let what = format!("{name}, {mates} mates, step {step}, slot {slot}");
                if slot == place && step < 4 {
                    assert!(got.2, "{what}: no fault");
                    continue;
                }
                assert!(!got.2 && !expected.2, "{what}: a fault");
                if exact {
                    assert_eq!(got, expected, "{what}");
                } else {
                    near(&got.0, &expected.0, &what);
                    near(&got.1, &expected.1, &what);
                }
            }
        }
    }
}

/// Words of results that are tokens or floats, the latter within rounding.
fn near(got: &[u32], expected: &[u32], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (got, expected) in got.iter().zip(expected) {
        let apart = (f32::from_bits(*got) - f32::from_bits(*expected)).abs();
        assert!(got == expected || apart < 1e-5, "{what}: {got:x} for {expected:x}");
    }
}

/// As [`a_nan_ends_one_request`], while steps run ahead of the fault: what runs for the request until
/// the scheduler hears of it disturbs nobody.
pub fn a_nan_in_flight_leaves_batch_mates_alone(base: Setup) {
    for (name, config) in families().into_iter().filter(|(name, _)| !name.contains("tied")) {
        let model = Model::new(&config, 2);
        let (poisoned, clean, bad) = poisoned(&model);
        let run = |with_bad: bool| {
            let mut session = model.session_over(poisoned, base);
            session.admit(0, &clean, 80, Sampling::default());
            session.admit(1, if with_bad { &bad } else { &clean }, 80, Sampling::default());
            let mut plans = vec![session.plan(&[(0, 80), (1, 80)])];
            plans.extend((0..3).map(|_| session.plan(&[])));
            session.drive(&plans, 1).0
        };
        let (with_bad, without) = (run(true), run(false));
        for (at, (one, other)) in with_bad.iter().zip(&without).enumerate() {
            assert_eq!(one.sampled[0], other.sampled[0], "{name}, step {at}: the mate");
            let fault = one.sampled[1].fault;
            assert_eq!(fault, Some(SampleFault::NotANumber), "{name}, step {at}");
        }
        assert_eq!((with_bad.len(), without.len()), (4, 4));
    }
}
