//! The device draws the tokens that the processor draws, and describes rows as it does.

use super::*;
use crate::cuda::testing::{Device, device, small};
use crate::sample::{self as cpu, Fault, LogSoftmax, Params, Seen, Workspace};
use crate::testing::Random;

/// Rows of all shapes: spread out, flat, with ties, peaked, with banned tokens, all equal, zeros of
/// both signs, normal, flat with some far away.
fn row(vocab: usize, shape: usize, seed: u64) -> Vec<f32> {
    let mut random = Random::new(seed);
    let mut row = random.vector(vocab);
    let others = random.vector(vocab);
    for (i, x) in row.iter_mut().enumerate() {
        *x = match shape {
            0 => *x * 20.0,
            1 => *x * 0.01,
            2 => (*x * 12.0).round() / 2.0,
            3 => *x * *x * *x * 30.0 - 500.0,
            4 if *x < -0.5 => f32::NEG_INFINITY,
            4 => *x * 8.0,
            5 => 1.5,
            6 => [0.0, -0.0][i % 2],
            7 => (*x + others[i]) * 2.0,
            _ if i % 1000 == 3 => -1e30,
            _ => *x * 0.001,
        };
    }
    if shape < 5 {
        row[random.below(vocab)] = if seed.is_multiple_of(3) { 21.0 } else { 3.0 };
    }
    row
}
const SHAPES: usize = 9;
const VOCABS: [usize; 12] =
    [1, 2, 7, 33, 1000, 1025, 16_385, 32_000, 102_400, 151_936, 151_937, 200_064];

/// Where tests are small, rows of one block and of two.
fn vocabs<const N: usize>(all: [usize; N]) -> impl Iterator<Item = usize> {
    all.into_iter().filter(|vocab| *vocab < 20_000 || !small())
}

/// What rows ask for beside their own parameters.
#[derive(Default)]
struct Lists {
    seen: Vec<u32>,
    bias: Vec<(u32, f32)>,
    banned: Vec<u32>,
}

/// Tokens and faults of rows on the device; asserts that their logits stay. Counts come back changed.
fn draw(
    device: &Device,
    logits: &[f32],
    vocab: usize,
    how: &[SampleRow],
    lists: &mut Lists,
) -> Vec<(u32, u32)> {
    let (sent, rows) = (device.send(logits), device.send(how));
    let (tokens, faults) = (device.poisoned(how.len() * 4), device.poisoned(how.len() * 4));
    let with_one = |list: Vec<u32>| device.send(&[list, vec![0]].concat());
    let seen = (!lists.seen.is_empty()).then(|| device.send(&lists.seen));
    let bias_tokens = with_one(lists.bias.iter().map(|b| b.0).collect());
    let bias_values = with_one(lists.bias.iter().map(|b| b.1.to_bits()).collect());
    let banned = with_one(lists.banned.clone());
    let operands = Sample {
        logits: &sent,
        vocab,
        how: &rows,
        seen: seen.as_ref(),
        bias: Some((&bias_tokens, &bias_values)),
        banned: Some(&banned),
        tokens: &tokens,
        faults: &faults,
    };
    sample(device.queue(), Rows::exactly(how.len()), &operands).expect("a launch");
    let bits = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert!(bits(&device.fetch(&sent, 0.0)) == bits(logits), "logits were changed");
    if let Some(seen) = seen {
        lists.seen = device.fetch(&seen, 0);
    }
    device.fetch(&tokens, 0).into_iter().zip(device.fetch(&faults, 0)).collect()
}

/// Draws as the processor does.
fn expected(
    mut logits: Vec<f32>,
    how: &SampleRow,
    seen: &[u32],
    lists: &Lists,
    workspace: &mut Workspace,
) -> Result<u32, Fault> {
    let mut known = Seen::none();
    for (token, count) in (0..).zip(seen).filter(|(_, count)| **count > 0) {
        known.prompt(token);
        (0..*count & !SEEN).for_each(|_| known.output(token));
    }
    let range = |start: u32, count: u32| start as usize..(start + count) as usize;
    let params = Params {
        temperature: how.temperature,
        top_k: how.top_k,
        top_p: how.top_p,
        min_p: how.min_p,
        seed: how.seed,
        choice: how.choice,
        position: how.position,
        repetition_penalty: how.repetition,
        frequency_penalty: how.frequency,
        presence_penalty: how.presence,
        seen: &known,
        bias: &lists.bias[range(how.bias_start, how.bias_count)],
        banned: &lists.banned[range(how.banned_start, how.banned_count)],
    };
    cpu::sample(&mut logits, &params, workspace)
}

/// In counts: a token that was seen at all.
const SEEN: u32 = 1 << 31;

#[test]
fn every_mix_of_parameters_draws_what_the_processor_draws() {
    let Some(device) = device() else { return };
    let mut random = Random::new(77);
    for vocab in vocabs(VOCABS) {
        let count = if small() {
            20
        } else if vocab > 10_000 {
            54
        } else {
            200
        };
        let mut logits = Vec::new();
        let mut rows = Vec::new();
        let mut lists = Lists { seen: vec![0; count * vocab], ..Lists::default() };
        for i in 0..count {
            logits.extend(row(vocab, i % SHAPES, random.next()));
            let pick = |random: &mut Random, of: [f32; 5]| of[random.below(5)];
            let mut how = SampleRow {
                seed: random.next(),
                temperature: pick(&mut random, [0.0, 1.0, 0.3, 1.7, 1e-40]),
                top_k: [0, 0, 1, 5, 50, 700, 5000, vocab as u32, u32::MAX][random.below(9)],
                top_p: pick(&mut random, [1.0, 0.9, 0.5, 0.01, 0.999]),
                min_p: pick(&mut random, [0.0, 0.0, 0.05, 0.3, 1.0]),
                choice: random.below(3) as u32,
                position: i as u32,
                slot: (count - 1 - i) as u32,
                ..SampleRow::GREEDY
            };
            if i % 3 == 0 {
                how.repetition = pick(&mut random, [1.0, 1.3, 0.8, 1.1, 1.0]);
                how.frequency = pick(&mut random, [0.0, 0.25, -0.5, 1.0, 0.1]);
                how.presence = pick(&mut random, [0.5, 0.25, -0.5, 0.0, 0.0]);
                for _ in 0..vocab.min(300) {
                    let at = how.slot as usize * vocab + random.below(vocab);
                    lists.seen[at] = SEEN | random.below(4) as u32;
                }
            }
            if i % 4 == 1 {
                how.bias_start = lists.bias.len() as u32;
                let step = vocab.div_ceil(300);
                let tokens = (0..vocab as u32 + 3).step_by(step);
                lists.bias.extend(tokens.map(|token| (token, random.below(9) as f32 - 4.0)));
                how.bias_count = lists.bias.len() as u32 - how.bias_start;
            }
            if i % 5 == 2 {
                how.banned_start = lists.banned.len() as u32;
                how.banned_count = 3;
                lists.banned.extend((0..3).map(|_| random.below(vocab + 2) as u32));
            }
            rows.push(how);
        }
        let before = lists.seen.clone();
        let got = draw(&device, &logits, vocab, &rows, &mut lists);
        let after = std::mem::replace(&mut lists.seen, before.clone());
        assert_eq!(got, draw(&device, &logits, vocab, &rows, &mut lists), "twice the same");
        let mut workspace = Workspace::new(vocab);
        let mut differ = 0;
        for (index, (how, logits)) in rows.iter().zip(logits.chunks_exact(vocab)).enumerate() {
            let slot = how.slot as usize * vocab;
            let seen = &before[slot..slot + vocab];
            match expected(logits.to_vec(), how, seen, &lists, &mut workspace) {
                Ok(token) => {
                    assert_eq!(got[index].1, fault::NONE, "{vocab} {how:?}");
                    differ += usize::from(got[index].0 != token);
                }
                Err(Fault::NothingAllowed) => assert_eq!(got[index], (0, fault::NOTHING_ALLOWED)),
                Err(Fault::NotANumber) => assert_eq!(got[index], (0, fault::NOT_A_NUMBER)),
            }
            let mut counts = seen.to_vec();
            let penalised = how.repetition != 1.0 || how.frequency != 0.0 || how.presence != 0.0;
            if penalised && got[index].1 == fault::NONE {
                let count = &mut counts[got[index].0 as usize];
                *count = (*count + 1) | SEEN;
            }
            assert!(after[slot..slot + vocab] == counts, "counts of row {index} at {vocab}");
        }
        // A cut by mass within rounding of a token's border may fall on either side of it.
        assert!(differ <= count / 100, "{differ} of {count} draws differ at {vocab}");
    }
}

#[test]
fn the_likeliest_is_the_first_of_the_highest_by_either_kernel() {
    let Some(device) = device() else { return };
    let mut random = Random::new(5);
    for vocab in vocabs(VOCABS) {
        let count = 2 * SHAPES;
        let rows: Vec<Vec<f32>> =
            (0..count).map(|i| row(vocab, i % SHAPES, random.next())).collect();
        let mut logits = rows.concat();
        // Two rows without a distribution, next to others.
        logits[3 * vocab..4 * vocab].fill(f32::NEG_INFINITY);
        logits[5 * vocab + random.below(vocab)] = f32::NAN;
        let how = vec![SampleRow::GREEDY; count];
        let got = draw(&device, &logits, vocab, &how, &mut Lists::default());
        let sent = device.send(&logits);
        let (tokens, faults) = (device.poisoned(count * 4), device.poisoned(count * 4));
        greedy(device.queue(), Rows::exactly(count), vocab, &sent, (&tokens, &faults))
            .expect("a launch");
        let (tokens, faults) = (device.fetch(&tokens, 0_u32), device.fetch(&faults, 0_u32));
        assert_eq!(got, tokens.into_iter().zip(faults).collect::<Vec<_>>(), "{vocab}");
        let mut workspace = Workspace::new(vocab);
        for (index, row) in logits.chunks_exact(vocab).enumerate() {
            let seen = vec![0; vocab];
            let e = expected(row.to_vec(), &how[index], &seen, &Lists::default(), &mut workspace);
            assert_eq!(
                got[index],
                match e {
                    Ok(token) => (token, fault::NONE),
                    Err(Fault::NotANumber) => (0, fault::NOT_A_NUMBER),
                    Err(Fault::NothingAllowed) => (0, fault::NOTHING_ALLOWED),
                }
            );
        }
    }
}

#[test]
fn a_row_that_is_no_distribution_leaves_its_neighbours_alone() {
    let Some(device) = device() else { return };
    let vocab = 20_000;
    let how: Vec<SampleRow> = (0..6)
        .map(|i| SampleRow {
            temperature: 1.0,
            seed: 9,
            position: i,
            top_k: [0, 40][i as usize % 2],
            top_p: [1.0, 0.9, 0.8][i as usize % 3],
            ..SampleRow::GREEDY
        })
        .collect();
    let mut logits: Vec<f32> = (0..6).flat_map(|i| row(vocab, i, 3 + i as u64)).collect();
    let clean = draw(&device, &logits, vocab, &how, &mut Lists::default());
    logits[vocab + 77] = f32::NAN;
    logits[4 * vocab + 19_999] = f32::INFINITY;
    let got = draw(&device, &logits, vocab, &how, &mut Lists::default());
    for index in 0..6 {
        let spoiled = index == 1 || index == 4;
        assert_eq!(got[index], if spoiled { (0, fault::NOT_A_NUMBER) } else { clean[index] });
    }
}

#[test]
fn draws_follow_the_exact_distribution() {
    let Some(device) = device() else { return };
    // More tokens than a block, of which twenty have weight, in every block's stretch.
    let vocab = 40_000;
    let few: Vec<f32> = Random::new(1).vector(20).iter().map(|x| x * 2.0).collect();
    let mut logits = vec![f32::NEG_INFINITY; vocab];
    (0..20).for_each(|i| logits[i * 2000 + 13] = few[i]);
    let (draws, at_once) = if small() { (75, 25) } else { (2000, 100) };
    for (top_k, top_p) in [(0, 1.0), (6, 1.0), (0, 0.8)] {
        let base = SampleRow { seed: 4, temperature: 1.0, top_k, top_p, ..SampleRow::GREEDY };
        let mut order: Vec<(usize, f64)> =
            few.iter().map(|x| f64::from(*x).exp()).enumerate().collect();
        order.sort_by(|a, b| b.1.total_cmp(&a.1));
        order.truncate(if top_k > 0 { top_k as usize } else { 20 });
        let whole: f64 = order.iter().map(|x| x.1).sum();
        let mut mass = 0.0;
        let last = order.iter().position(|x| {
            mass += x.1;
            mass >= f64::from(top_p) * whole
        });
        order.truncate(last.map_or(20, |last| last + 1));
        let whole: f64 = order.iter().map(|x| x.1).sum();
        let mut counts = [0_u32; 20];
        for first in (0..draws).step_by(at_once) {
            let how: Vec<SampleRow> = (first..first + at_once as u32)
                .map(|position| SampleRow { position, ..base })
                .collect();
            let rows = logits.repeat(at_once);
            for (token, left) in draw(&device, &rows, vocab, &how, &mut Lists::default()) {
                assert_eq!((left, token % 2000), (fault::NONE, 13));
                counts[token as usize / 2000] += 1;
            }
        }
        let mut chi = 0.0;
        for (index, weight) in &order {
            let mean = weight / whole * f64::from(draws);
            chi += (f64::from(std::mem::take(&mut counts[*index])) - mean).powi(2) / mean;
        }
        assert_eq!(counts, [0; 20], "what was filtered was drawn");
        // Mean is the degrees of freedom; six standard deviations above it.
        let freedom = (order.len() - 1) as f64;
        assert!(chi < freedom + 6.0 * (2.0 * freedom).sqrt(), "chi-square {chi} of {freedom}");
    }
}

#[test]
fn tokens_are_counted_from_prompt_and_output() {
    let Some(device) = device() else { return };
    let seen = device.send(&[0_u32; 6]);
    let known = device.send(&[0_u32, 1, 2, 2, 99]);
    count_tokens(device.queue(), &known, 5, 2, &seen, 6).expect("a launch");
    assert_eq!(device.fetch(&seen, 0_u32), [SEEN, SEEN, SEEN | 2, 0, 0, 0]);
}

#[test]
fn faults_are_named_wherever_they_lie() {
    let Some(device) = device() else { return };
    for vocab in [1, 32, 1024, 3000, 40_000] {
        for at in [0, vocab / 2, vocab - 1] {
            for temperature in [0.0, 1.0] {
                let how = SampleRow { temperature, ..SampleRow::GREEDY };
                let mut logits = vec![0.5; 2 * vocab];
                logits[at] = f32::NAN;
                logits[vocab + at] = f32::INFINITY;
                logits.extend(vec![f32::NEG_INFINITY; 2 * vocab]);
                logits[3 * vocab + at] = -3.0;
                let got = draw(&device, &logits, vocab, &[how; 4], &mut Lists::default());
                let faults: Vec<u32> = got.iter().map(|g| g.1).collect();
                assert_eq!(faults, [1, 1, 2, 0]);
                assert_eq!(got[3].0, at as u32);
            }
        }
    }
}

#[test]
fn log_probabilities_and_ranks_are_those_of_the_raw_row() {
    let Some(device) = device() else { return };
    let mut random = Random::new(7);
    for (vocab, shape) in vocabs([1, 5, 257, 3000, 16_385, 102_400, 151_937])
        .flat_map(|v| (0..SHAPES).map(move |s| (v, s)))
    {
        let (rows, most) = (3, [20, MOST_LISTED][shape % 2]);
        let logits: Vec<f32> = (0..rows).flat_map(|_| row(vocab, shape, random.next())).collect();
        let chosen: Vec<u32> = (0..rows).map(|_| random.below(vocab) as u32).collect();
        let wanted = [most as u32, 0, UNWANTED];
        let sent = device.send(&logits);
        // The first is given, and something else was drawn; the second was drawn.
        let drawn = [random.below(vocab) as u32, chosen[1], chosen[2]];
        let given = [chosen[0], UNWANTED, UNWANTED];
        let lists = [device.send(&drawn), device.send(&wanted), device.send(&given)];
        let out = device.send(&vec![TokenLogprob::default(); rows * (1 + most)]);
        let operands = Logprobs {
            logits: &sent,
            vocab,
            chosen: &lists[0],
            given: Some(&lists[2]),
            wanted: &lists[1],
            most,
            out: &out,
        };
        logprobs(device.queue(), Rows::exactly(rows), &operands).expect("a launch");
        let got = device.fetch(&out, TokenLogprob::default());
        for index in 0..2 {
            let row = &logits[index * vocab..][..vocab];
            let softmax = LogSoftmax::of(row);
            let mut expected = vec![softmax.token(row, chosen[index])];
            let mut top = Vec::new();
            softmax.top(row, wanted[index] as usize, &mut top);
            expected.extend(top);
            for (entry, e) in got[index * (1 + most)..].iter().zip(expected) {
                assert_eq!((entry.token, entry.rank), (e.token, e.rank), "{vocab} {shape}");
                let near = (entry.logprob - e.logprob).abs() <= 1e-5 * e.logprob.abs().max(1.0);
                assert!(near || entry.logprob == e.logprob, "{entry:?} {e:?}");
            }
        }
        assert!(got[2 * (1 + most)..].iter().all(|e| *e == TokenLogprob::default()));
    }
}

#[test]
fn a_row_with_nan_has_no_log_probabilities() {
    let Some(device) = device() else { return };
    let mut logits = Random::new(3).vector(600);
    logits[300] = f32::NAN;
    let sent = device.send(&logits);
    let lists = [device.send(&[7_u32]), device.send(&[20_u32])];
    let out = device.send(&[TokenLogprob::default(); 21]);
    let operands = Logprobs {
        logits: &sent,
        vocab: 600,
        chosen: &lists[0],
        given: None,
        wanted: &lists[1],
        most: 20,
        out: &out,
    };
    logprobs(device.queue(), Rows::exactly(1), &operands).expect("a launch");
    assert!(device.fetch(&out, TokenLogprob::default()).iter().all(|e| e.logprob.is_nan()));
}

#[test]
fn words_are_the_layout_that_the_device_has() {
    let row = SampleRow {
        seed: 0x0102_0304_0506_0708,
        temperature: 0.5,
        top_p: 0.25,
        min_p: 0.125,
        repetition: 1.5,
        frequency: 2.5,
        presence: 3.5,
        top_k: 9,
        choice: 10,
        position: 11,
        slot: 12,
        bias_start: 13,
        bias_count: 14,
        banned_start: 15,
        banned_count: 16,
    };
    // SAFETY: a plain struct of 64 bytes without padding, read as as many words.
    let layout: [u32; 16] = unsafe { std::mem::transmute(row) };
    assert_eq!(row.words(), layout);
}
