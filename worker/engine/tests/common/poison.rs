//! NaN in one request's activations and cache.

use super::{Model, Setup, families, greedy, native, prompt};
use engine::{WeightError, WeightSource};
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

/// The model's weights with a row of NaN, a prompt without that token, and one with it.
fn poisoned(model: &Model) -> (&'static Poisoned, Vec<u32>, Vec<u32>) {
    let hidden = model.config.decoder().hidden;
    let mut table = model.weights.get("model.embed_tokens.weight").expect("a table").data.to_f32();
    table[POISON as usize * hidden..][..hidden].fill(f32::NAN);
    let poisoned = Box::leak(Box::new(Poisoned { weights: model.weights, table }));
    let clean = prompt(80, 1).into_iter().map(|t| if t == POISON { 1 } else { t });
    let clean: Vec<u32> = clean.collect();
    let mut bad = clean.clone();
    bad[30] = POISON;
    (poisoned, clean, bad)
}

/// A NaN ends its request; its batch mates' results are the same to the bit.
pub fn a_nan_ends_one_request(base: Setup) {
    for (name, config) in families().into_iter().chain(native()) {
        if name.contains("tied") {
            // There the poisoned row is a row of the head too, and every request holds it.
            continue;
        }
        let model = Model::new(&config, 2);
        let (poisoned, clean, bad) = poisoned(&model);

        let run = |with_bad: bool| {
            let mut session = model.session_over(poisoned, base);
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
