//! Draws against exact distributions, filters against a full sort in f64.

use super::*;
use crate::testing::Random;
use device::Isa;
use proptest::prelude::*;

const PLAIN: Params<'static> = Params {
    temperature: 1.0,
    top_k: 0,
    top_p: 1.0,
    min_p: 0.0,
    seed: 1,
    choice: 0,
    position: 0,
    repetition_penalty: 1.0,
    frequency_penalty: 0.0,
    presence_penalty: 0.0,
    seen: &NOTHING,
    bias: &[],
    banned: &[],
};
static NOTHING: Seen = Seen::none();

/// Tokens kept with their probabilities, in f64 by a full sort; `slack` moves top-p and min-p.
fn exact(logits: &[f32], params: &Params<'_>, slack: f64) -> Vec<(u32, f64)> {
    let t = f64::from(params.temperature);
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut all: Vec<(u32, f64)> =
        (0..).zip(logits).map(|(i, l)| (i, ((f64::from(*l) - f64::from(top)) / t).exp())).collect();
    all.retain(|x| logits[x.0 as usize] > f32::NEG_INFINITY);
    let of = |x: &(u32, f64)| logits[x.0 as usize];
    all.sort_by(|a, b| of(b).partial_cmp(&of(a)).expect("numbers").then(a.0.cmp(&b.0)));
    if params.top_k > 0 {
        all.truncate(params.top_k as usize);
    }
    if params.top_p < 1.0 {
        let whole: f64 = all.iter().map(|x| x.1).sum();
        let target = (f64::from(params.top_p) + slack) * whole;
        let mut mass = 0.0;
        let reached = all.iter().position(|x| {
            mass += x.1;
            mass >= target
        });
        all.truncate(reached.map_or(all.len(), |last| last + 1));
    }
    all.retain(|x| x.1 >= f64::from(params.min_p) * (1.0 - slack) || x.1 == 1.0);
    let whole: f64 = all.iter().map(|x| x.1).sum();
    all.into_iter().map(|(i, w)| (i, w / whole)).collect()
}

/// What the filters keep, sorted.
fn kept(logits: &[f32], params: &Params<'_>, workspace: &mut Workspace) -> Vec<u32> {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    workspace.tops.clear();
    workspace.tops.extend(
        logits.chunks(choose::CHUNK).map(|c| c.iter().copied().fold(f32::NEG_INFINITY, f32::max)),
    );
    filter::keep(Isa::detect(), logits, highest, params, workspace);
    let Workspace { tokens, weights, .. } = workspace;
    if tokens.is_empty() {
        assert_eq!(weights.len(), logits.len());
        return (0..logits.len() as u32).collect();
    }
    assert!(tokens.is_sorted_by(|a, b| a < b) && tokens.len() == weights.len());
    tokens.clone()
}

#[test]
fn known_answers_of_the_generator() {
    // From the reference distribution's known-answer tests.
    assert_eq!(philox4x32_10([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
    assert_eq!(
        philox4x32_10([u32::MAX; 4], [u32::MAX; 2]),
        [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
    );
    assert_eq!(
        philox4x32_10(
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0]
        ),
        [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
    );
}

#[test]
fn draws_follow_the_exact_distribution() {
    let logits: Vec<f32> = Random::new(1).vector(20).iter().map(|x| x * 2.0).collect();
    for params in [
        PLAIN,
        Params { temperature: 0.5, ..PLAIN },
        Params { top_k: 5, ..PLAIN },
        Params { top_p: 0.7, temperature: 1.5, ..PLAIN },
        Params { min_p: 0.2, ..PLAIN },
        Params { top_k: 9, top_p: 0.9, min_p: 0.05, ..PLAIN },
    ] {
        let expected = exact(&logits, &params, 0.0);
        let mut counts = [0_u32; 20];
        let draws = 20_000;
        let mut workspace = Workspace::new(20);
        for position in 0..draws {
            let mut row = logits.clone();
            let token = sample(&mut row, &Params { position, ..params }, &mut workspace);
            counts[token.expect("a token") as usize] += 1;
        }
        let kept: Vec<u32> = expected.iter().map(|e| e.0).collect();
        for (token, count) in (0_u32..).zip(counts) {
            assert!(count == 0 || kept.contains(&token), "{token} was filtered");
        }
        let chi: f64 = expected
            .iter()
            .map(|(token, p)| {
                let mean = p * f64::from(draws);
                (f64::from(counts[*token as usize]) - mean).powi(2) / mean
            })
            .sum();
        // Mean is the degrees of freedom; six standard deviations above it.
        let freedom = (expected.len().max(2) - 1) as f64;
        assert!(chi < freedom + 6.0 * (2.0 * freedom).sqrt(), "chi-square {chi} of {freedom}");
    }
}

/// Rows of all shapes: spread out, flat, with ties, with one far ahead, with banned tokens.
fn rows() -> impl Strategy<Value = Vec<f32>> {
    let vocab = prop_oneof![1_usize..4, 4_usize..700, 700_usize..3000];
    (vocab, any::<u64>(), 0_u8..5).prop_map(|(vocab, seed, shape)| {
        let mut random = Random::new(seed);
        let mut row: Vec<f32> = random.vector(vocab);
        for x in &mut row {
            *x = match shape {
                0 => *x * 20.0,
                1 => *x * 0.01,
                2 => (*x * 12.0).round() / 2.0,
                3 => *x * *x * *x * 30.0 - 500.0,
                _ if *x < -0.5 => f32::NEG_INFINITY,
                _ => *x * 8.0,
            };
        }
        row[random.below(vocab)] = if seed % 3 == 0 { 21.0 } else { 3.0 };
        row
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn filters_keep_exactly_what_a_full_sort_keeps(
        logits in rows(),
        temperature in prop_oneof![Just(1.0_f32), 0.05_f32..2.0],
        top_k in prop_oneof![Just(0_u32), Just(1), 2_u32..100, 100_u32..3000],
        top_p in prop_oneof![Just(1.0_f32), 0.01_f32..1.0, 0.9_f32..0.999],
        min_p in prop_oneof![Just(0.0_f32), 0.0_f32..1.0, Just(1.0)],
    ) {
        let params = Params { temperature, top_k, top_p, min_p, ..PLAIN };
        let mut workspace = Workspace::new(logits.len());
        let got = kept(&logits, &params, &mut workspace);
        let ids = |list: Vec<(u32, f64)>| {
            let mut ids: Vec<u32> = list.into_iter().map(|x| x.0).collect();
            ids.sort_unstable();
            ids
        };
        // Where no filter is on, tokens without weight are listed and never drawn.
        let got: Vec<u32> =
            got.into_iter().filter(|i| logits[*i as usize] > f32::NEG_INFINITY).collect();
        // Weights are 32 bits wide: at a cut that lies within rounding either side may be taken.
        let [less, same, more] = [-2e-6, 0.0, 2e-6].map(|slack| ids(exact(&logits, &params, slack)));
        if less == more {
            prop_assert_eq!(&got, &same);
        } else {
            let inside = |a: &[u32], b: &[u32]| a.iter().all(|x| b.binary_search(x).is_ok());
            prop_assert!(inside(&less, &got) && inside(&got, &more));
        }
        // Another processor keeps the same, to the bit.
        let weights = workspace.weights.clone();
        for isa in Isa::available() {
            let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            filter::keep(isa, &logits, highest, &params, &mut workspace);
            prop_assert_eq!(&workspace.weights, &weights);
        }
    }

    #[test]
    fn the_same_inputs_give_the_same_token_whatever_came_before(
        logits in rows(),
        other in rows(),
        seed in any::<u64>(),
        top_p in prop_oneof![Just(1.0_f32), 0.5_f32..1.0],
        top_k in prop_oneof![Just(0_u32), 1_u32..50],
    ) {
        let params = Params { seed, top_p, top_k, position: 3, ..PLAIN };
        let fresh = sample(&mut logits.clone(), &params, &mut Workspace::default());
        let mut used = Workspace::default();
        let _ = sample(&mut other.clone(), &params, &mut used);
        prop_assert_eq!(sample(&mut logits.clone(), &params, &mut used), fresh);
    }
}

#[test]
fn any_temperature_that_is_allowed_gives_a_token() {
    let logits = [1.0, 5.0, 2.0, f32::NEG_INFINITY, 4.9];
    for temperature in [f32::MIN_POSITIVE, 1e-40, 1e-6, 0.01] {
        for (top_k, top_p, min_p) in [(0, 1.0, 0.0), (3, 0.5, 0.0), (0, 0.9, 0.1)] {
            let params = Params { temperature, top_k, top_p, min_p, ..PLAIN };
            let mut workspace = Workspace::default();
            assert_eq!(sample(&mut logits.clone(), &params, &mut workspace), Ok(1), "{params:?}");
        }
    }
}

#[test]
fn seed_choice_and_position_each_change_the_draw() {
    let mut random = Random::new(4);
    let mut numbers = std::collections::BTreeSet::new();
    for _ in 0..1000 {
        let (seed, choice, position) = (random.next(), random.below(9) as u32, random.below(99));
        for (s, c, p) in [(0, 0, 0), (1, 0, 0), (1 << 40, 0, 0), (0, 1, 0), (0, 0, 1)] {
            let u = uniform(seed ^ s, choice + c, position as u32 + p);
            assert!(u > 0.0 && u < 1.0);
            numbers.insert(u.to_bits());
        }
    }
    assert_eq!(numbers.len(), 5000);
}

#[test]
fn faults_are_named_wherever_they_lie() {
    for len in [1, 255, 256, 257, 600] {
        for at in [0, len / 2, len - 1] {
            for temperature in [0.0, 1.0] {
                let params = Params { temperature, ..PLAIN };
                let mut workspace = Workspace::default();
                for bad in [f32::NAN, f32::INFINITY] {
                    let mut row = vec![0.5; len];
                    row[at] = bad;
                    let got = sample(&mut row, &params, &mut workspace);
                    assert_eq!(got, Err(Fault::NotANumber), "{bad} at {at} of {len}");
                }
                let mut row = vec![f32::NEG_INFINITY; len];
                let got = sample(&mut row, &params, &mut workspace);
                assert_eq!(got, Err(Fault::NothingAllowed));
                row[at] = -3.0;
                assert_eq!(sample(&mut row, &params, &mut workspace), Ok(at as u32));
            }
        }
    }
}

#[test]
fn greedy_takes_the_first_of_the_highest() {
    let mut workspace = Workspace::default();
    let greedy = Params { temperature: 0.0, ..PLAIN };
    assert_eq!(sample(&mut [1.0, 3.0, 3.0, 2.0], &greedy, &mut workspace), Ok(1));
    assert_eq!(sample(&mut [1.0, f32::NAN], &greedy, &mut workspace), Err(Fault::NotANumber));
    let banned = Params { banned: &[0, 1], ..greedy };
    assert_eq!(sample(&mut [1.0, 2.0], &banned, &mut workspace), Err(Fault::NothingAllowed));
    assert_eq!(sample(&mut [1.0, 2.0, 0.0], &banned, &mut workspace), Ok(2));
}

#[test]
fn penalties_bias_and_bans_move_the_right_logits() {
    let mut seen = Seen::default();
    seen.prompt(0);
    seen.prompt(1);
    seen.output(2);
    seen.output(2);
    let params = Params {
        temperature: 0.0,
        repetition_penalty: 2.0,
        frequency_penalty: 0.5,
        presence_penalty: 0.25,
        seen: &seen,
        bias: &[(3, 10.0), (99, 1.0)],
        banned: &[4, 99],
        ..PLAIN
    };
    let mut row = [4.0, -4.0, 8.0, 1.0, 100.0, 5.0];
    assert_eq!(sample(&mut row, &params, &mut Workspace::default()), Ok(3));
    assert_eq!(row, [2.0, -8.0, 4.0 - 1.0 - 0.25, 11.0, f32::NEG_INFINITY, 5.0]);
}

#[test]
fn log_probabilities_and_ranks_are_those_of_the_raw_row() {
    let mut random = Random::new(7);
    for vocab in [1, 5, 255, 256, 257, 3000] {
        let logits: Vec<f32> =
            random.vector(vocab).iter().map(|x| (x * 40.0).round() / 4.0).collect();
        let softmax = LogSoftmax::of(&logits);
        let sum: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
        let mut sorted: Vec<u32> = (0..vocab as u32).collect();
        sorted.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
        let mut top = Vec::new();
        softmax.top(&logits, 20, &mut top);
        let ids: Vec<u32> = top.iter().map(|t| t.token).collect();
        assert_eq!(ids, sorted[..vocab.min(20)]);
        for entry in top {
            let expected = f64::from(logits[entry.token as usize]) - sum.ln();
            assert!((f64::from(entry.logprob) - expected).abs() < 1e-5);
            assert_eq!(
                entry,
                softmax.token(&logits, entry.token),
                "rank of one equals rank in list"
            );
        }
    }
}

#[test]
fn a_row_with_nan_has_no_log_probabilities_and_no_panic() {
    let mut logits = Random::new(3).vector(600);
    for at in [0, 300, 599] {
        logits[at] = f32::NAN;
        let softmax = LogSoftmax::of(&logits);
        let mut top = Vec::new();
        softmax.top(&logits, 20, &mut top);
        assert!(top.iter().all(|entry| entry.logprob.is_nan()));
        assert!(softmax.token(&logits, 7).logprob.is_nan());
    }
}
