//! Routing and experts against plain f64.

use super::experts::experts_on;
use super::*;
use crate::testing::{Random, assert_close, poisoned};
use crate::{Matrix, WeightSlice};
use device::{Isa, ThreadPool};

/// The choice in f64, by sorting.
pub(super) fn choose(logits: &[f32], router: &Router<'_>) -> Vec<(u32, f64)> {
    let logits: Vec<f64> = logits.iter().map(|x| f64::from(*x)).collect();
    let scores: Vec<f64> = match router.scoring {
        Scoring::Sigmoid => logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
        Scoring::Softmax => {
            let sum: f64 = logits.iter().map(|x| x.exp()).sum();
            logits.iter().map(|x| x.exp() / sum).collect()
        }
    };
    let biased: Vec<f64> = (0..scores.len())
        .map(|e| scores[e] + router.correction.map_or(0.0, |bias| f64::from(bias[e])))
        .collect();
    let mut allowed: Vec<usize> = (0..scores.len()).collect();
    if let Some(limit) = router.limit {
        let size = scores.len() / limit.groups;
        let mut groups: Vec<(f64, usize)> = (0..limit.groups)
            .map(|g| {
                let mut of: Vec<f64> = biased[g * size..(g + 1) * size].to_vec();
                of.sort_by(|a, b| b.total_cmp(a));
                let best = if limit.score == GroupScore::Max { of[0] } else { of[0] + of[1] };
                (best, g)
            })
            .collect();
        groups.sort_by(|a, b| b.0.total_cmp(&a.0));
        let open: Vec<usize> = groups[..limit.chosen].iter().map(|g| g.1).collect();
        allowed.retain(|e| open.contains(&(e / size)));
    }
    allowed.sort_by(|a, b| biased[*b].total_cmp(&biased[*a]));
    allowed.truncate(router.top_k);
    let sum: f64 = allowed.iter().map(|e| scores[*e]).sum();
    let factor = f64::from(router.scale) / if router.norm_topk { sum } else { 1.0 };
    allowed.into_iter().map(|e| (e as u32, scores[e] * factor)).collect()
}

#[test]
fn every_kind_of_router_chooses_what_sorting_chooses() {
    let pool = ThreadPool::new(2);
    let mut random = Random::new(21);
    let bias: Vec<f32> = random.vector(24).iter().map(|x| x * 0.4).collect();
    let group = |score| Some(GroupLimit { groups: 6, chosen: 3, score });
    for scoring in [Scoring::Softmax, Scoring::Sigmoid] {
        for limit in [None, group(GroupScore::Max), group(GroupScore::SumTop2)] {
            for correction in [None, Some(&bias[..])] {
                for (norm_topk, top_k) in [(false, 1), (true, 4), (true, 7)] {
                    let router = Router {
                        experts: 24,
                        top_k,
                        scoring,
                        limit,
                        correction,
                        norm_topk,
                        scale: 2.5,
                    };
                    let logits: Vec<f32> = random.vector(24 * 33).iter().map(|x| x * 4.0).collect();
                    let mut chosen = vec![u32::MAX; 33 * top_k];
                    let mut weights = poisoned(33 * top_k);
                    route(&pool, &logits, &router, &mut chosen, &mut weights);
                    for token in 0..33 {
                        let expected = choose(&logits[token * 24..(token + 1) * 24], &router);
                        let at = token * top_k..(token + 1) * top_k;
                        let ids: Vec<u32> = expected.iter().map(|e| e.0).collect();
                        assert_eq!(chosen[at.clone()], ids, "{router:?}");
                        let values: Vec<f64> = expected.iter().map(|e| e.1).collect();
                        assert_close("weights", &weights[at], &values, 1e-5);
                    }
                }
            }
        }
    }
}

#[test]
fn a_tie_goes_to_the_lower_number_and_nan_chooses_something() {
    let pool = ThreadPool::new(1);
    let router = Router {
        experts: 4,
        top_k: 2,
        scoring: Scoring::Softmax,
        limit: None,
        correction: None,
        norm_topk: false,
        scale: 1.0,
    };
    let (mut chosen, mut weights) = ([9; 2], [0.0; 2]);
    route(&pool, &[1.0; 4], &router, &mut chosen, &mut weights);
    assert_eq!(chosen, [0, 1]);
    route(&pool, &[f32::NAN; 4], &router, &mut chosen, &mut weights);
    assert!(chosen.iter().all(|e| *e < 4) && weights.iter().all(|w| w.is_nan()));
}

fn product(x: &[f64], w: &Matrix<'_>) -> Vec<f64> {
    let row = |r: usize| (0..w.cols).map(move |c| f64::from(w.data.get(r * w.cols + c)));
    (0..w.rows).map(|r| row(r).zip(x).map(|(w, x)| w * x).sum()).collect()
}

#[test]
fn the_sum_of_experts_agrees_with_f64_for_few_and_many_tokens() {
    let mut random = Random::new(22);
    for (tokens, held, first, top_k, hidden, inner) in
        [(1, 5, 0, 2, 9, 7), (3, 8, 0, 3, 33, 65), (70, 4, 0, 2, 17, 130), (20, 3, 2, 2, 16, 16)]
    {
        let total = held + 2 * first;
        let make = |random: &mut Random, len: usize| -> Vec<Vec<f32>> {
            (0..held).map(|_| random.vector(len)).collect()
        };
        let (gate, up, down) = (
            make(&mut random, inner * hidden),
            make(&mut random, inner * hidden),
            make(&mut random, inner * hidden),
        );
        let gate: Vec<Matrix<'_>> =
            gate.iter().map(|w| Matrix::new(WeightSlice::F32(w), inner, hidden)).collect();
        let up: Vec<Matrix<'_>> =
            up.iter().map(|w| Matrix::new(WeightSlice::F32(w), inner, hidden)).collect();
        let down: Vec<Matrix<'_>> =
            down.iter().map(|w| Matrix::new(WeightSlice::F32(w), hidden, inner)).collect();
        let x = random.vector(tokens * hidden);
        let chosen: Vec<u32> = (0..tokens)
            .flat_map(|_| {
                let start = random.below(total);
                (0..top_k).map(move |j| ((start + j) % total) as u32)
            })
            .collect();
        let shares = random.vector(tokens * top_k);
        let routing = Routing { experts: &chosen, weights: &shares, top_k };
        let weights = ExpertWeights { first, gate: &gate, up: &up, down: &down };

        let mut expected = vec![0.0_f64; tokens * hidden];
        for (pair, expert) in chosen.iter().enumerate() {
            let Some(e) = (*expert as usize).checked_sub(first).filter(|e| *e < held) else {
                continue;
            };
            let row = pair / top_k * hidden;
            let x: Vec<f64> = x[row..row + hidden].iter().map(|x| f64::from(*x)).collect();
            let inside: Vec<f64> = product(&x, &gate[e])
                .iter()
                .zip(product(&x, &up[e]))
                .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
                .collect();
            for (i, y) in product(&inside, &down[e]).iter().enumerate() {
                expected[row + i] += f64::from(shares[pair]) * y;
            }
        }
        for isa in Isa::available() {
            let pool = ThreadPool::new(3);
            let mut scratch = Scratch::new(&pool, tokens, top_k, held, hidden, inner);
            let mut out = poisoned(tokens * hidden);
            experts_on(isa, &pool, &x, &routing, &weights, &mut out, &mut scratch);
            assert_close(&format!("{isa} {tokens} tokens"), &out, &expected, 2e-4);
            let again = out.to_vec();
            experts_on(isa, &pool, &x, &routing, &weights, &mut out, &mut scratch);
            assert_eq!(again[..], out[..], "scratch carries nothing over");
        }
    }
}
