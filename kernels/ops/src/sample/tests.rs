//! Draws against exact distributions, filters against a full sort in f64.

use super::*;
use crate::testing::Random;

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

/// Tokens kept with their probabilities, by a full sort.
fn exact(logits: &[f32], params: &Params<'_>) -> Vec<(u32, f64)> {
    let t = f64::from(params.temperature);
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut all: Vec<(u32, f64)> =
        (0..).zip(logits).map(|(i, l)| (i, ((f64::from(*l) - f64::from(top)) / t).exp())).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if params.top_k > 0 {
        all.truncate(params.top_k as usize);
    }
    let whole: f64 = all.iter().map(|x| x.1).sum();
    let mut mass = 0.0;
    let mut count = 0;
    while count < all.len() && (count == 0 || mass < f64::from(params.top_p) * whole) {
        mass += all[count].1;
        count += 1;
    }
    if params.top_p < 1.0 {
        all.truncate(count);
    }
    all.retain(|x| x.1 >= f64::from(params.min_p));
    let whole: f64 = all.iter().map(|x| x.1).sum();
    all.into_iter().map(|(i, w)| (i, w / whole)).collect()
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
        let expected = exact(&logits, &params);
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

#[test]
fn filters_keep_what_a_full_sort_keeps() {
    let mut random = Random::new(2);
    for case in 0..300 {
        let vocab = 1 + random.below(1500);
        // Coarse logits, so that ties are common.
        let logits: Vec<f32> =
            random.vector(vocab).iter().map(|x| (x * 12.0).round() / 2.0).collect();
        let params = Params {
            temperature: 0.25 + random.below(8) as f32 / 4.0,
            top_k: random.below(vocab + 1) as u32,
            top_p: [1.0, 0.1, 0.5, 0.9, 0.99][random.below(5)],
            min_p: [0.0, 0.01, 0.3][random.below(3)],
            ..PLAIN
        };
        let expected = exact(&logits, &params);
        let mut workspace = Workspace::new(vocab);
        let mut got = std::collections::BTreeSet::new();
        for position in 0..200 {
            let mut row = logits.clone();
            let token = sample(&mut row, &Params { position, ..params }, &mut workspace);
            got.insert(token.expect("a token"));
        }
        for token in got {
            assert!(expected.iter().any(|e| e.0 == token), "case {case}: {token} {params:?}");
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
    for vocab in [1, 5, 300] {
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
