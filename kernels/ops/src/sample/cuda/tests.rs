//! The device draws the tokens that the processor draws, and describes rows as it does.

use super::*;
use crate::cuda::testing::{Device, device};
use crate::sample::{self as cpu, Fault, LogSoftmax, Params, Seen, Workspace};
use crate::testing::Random;

/// Rows of all shapes: spread out, flat, with ties, peaked, with banned tokens.
fn row(vocab: usize, shape: usize, seed: u64) -> Vec<f32> {
    let mut random = Random::new(seed);
    let mut row = random.vector(vocab);
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
    row[random.below(vocab)] = if seed.is_multiple_of(3) { 21.0 } else { 3.0 };
    row
}

/// Tokens and faults of rows on the device; `logits` come back changed.
fn draw(
    device: &Device,
    logits: &mut Vec<f32>,
    vocab: usize,
    how: &[SampleRow],
) -> Vec<(u32, u32)> {
    let (sent, rows) = (device.send(logits), device.send(how));
    let (tokens, faults) = (device.poisoned(how.len() * 4), device.poisoned(how.len() * 4));
    let operands = Sample {
        logits: &sent,
        vocab,
        how: &rows,
        seen: None,
        bias: None,
        banned: None,
        tokens: &tokens,
        faults: &faults,
    };
    sample(device.queue(), Rows::exactly(how.len()), &operands).expect("a launch");
    *logits = device.fetch(&sent, 0.0);
    device.fetch(&tokens, 0).into_iter().zip(device.fetch(&faults, 0)).collect()
}

#[test]
fn every_filter_draws_what_the_processor_draws() {
    let Some(device) = device() else { return };
    let none = Seen::none();
    let mut random = Random::new(77);
    for vocab in [1, 2, 31, 33, 1023, 1025, 5000, 151_936] {
        let mut logits = Vec::new();
        let mut rows = Vec::new();
        let count = if vocab > 10_000 { 60 } else { 200 };
        for i in 0..count {
            logits.extend(row(vocab, i % 5, random.next()));
            let pick = |random: &mut Random, of: [f32; 4]| of[random.below(4)];
            rows.push(SampleRow {
                seed: random.next(),
                temperature: pick(&mut random, [0.0, 1.0, 0.3, 1.7]),
                top_k: [0, 1, 5, 50, 700][random.below(5)],
                top_p: pick(&mut random, [1.0, 0.9, 0.5, 0.01]),
                min_p: pick(&mut random, [0.0, 0.0, 0.05, 1.0]),
                choice: random.below(3) as u32,
                position: i as u32,
                ..SampleRow::GREEDY
            });
        }
        let mut changed = logits.clone();
        let got = draw(&device, &mut changed, vocab, &rows);
        assert_eq!(got, draw(&device, &mut logits.clone(), vocab, &rows), "twice the same");
        let mut workspace = Workspace::new(vocab);
        let mut differ = 0;
        for (index, (how, logits)) in rows.iter().zip(logits.chunks_exact_mut(vocab)).enumerate() {
            let params = Params {
                temperature: how.temperature,
                top_k: how.top_k,
                top_p: how.top_p,
                min_p: how.min_p,
                seed: how.seed,
                choice: how.choice,
                position: how.position,
                repetition_penalty: 1.0,
                frequency_penalty: 0.0,
                presence_penalty: 0.0,
                seen: &none,
                bias: &[],
                banned: &[],
            };
            let expected = cpu::sample(logits, &params, &mut workspace).expect("a token");
            assert_eq!(got[index].1, fault::NONE);
            differ += usize::from(got[index].0 != expected);
        }
        // A cut by mass within rounding of a token's border may fall on either side of it.
        assert!(differ <= count / 100, "{differ} of {count} draws differ at {vocab}");
    }
}

#[test]
fn penalties_bias_and_bans_move_the_right_logits_and_counts_are_kept() {
    let Some(device) = device() else { return };
    let (vocab, slot) = (6, 1);
    let seen = device.send(&[0_u32; 12]);
    let known = device.send(&[0_u32, 1, 2, 2]);
    let slot_counts = seen.slice(slot * vocab * 4..(slot + 1) * vocab * 4);
    count_tokens(device.queue(), &known, 4, 2, &slot_counts, vocab).expect("a launch");
    let how = SampleRow {
        repetition: 2.0,
        frequency: 0.5,
        presence: 0.25,
        slot: slot as u32,
        bias_start: 1,
        bias_count: 2,
        banned_start: 1,
        banned_count: 2,
        ..SampleRow::GREEDY
    };
    let logits = device.send(&[4.0_f32, -4.0, 8.0, 1.0, 100.0, 5.0]);
    let rows = device.send(&[how]);
    let bias = (device.send(&[5_u32, 3, 99]), device.send(&[50.0_f32, 10.0, 1.0]));
    let banned = device.send(&[3_u32, 4, 99]);
    let (tokens, faults) = (device.poisoned(4), device.poisoned(4));
    let operands = Sample {
        logits: &logits,
        vocab,
        how: &rows,
        seen: Some(&seen),
        bias: Some((&bias.0, &bias.1)),
        banned: Some(&banned),
        tokens: &tokens,
        faults: &faults,
    };
    sample(device.queue(), Rows::exactly(1), &operands).expect("a launch");
    let got = device.fetch(&logits, 0.0_f32);
    assert_eq!(got, [2.0, -8.0, 4.0 - 1.0 - 0.25, 11.0, f32::NEG_INFINITY, 5.0]);
    assert_eq!(device.fetch(&tokens, 0_u32), [3]);
    let top = 1 << 31;
    assert_eq!(device.fetch(&slot_counts, 0_u32), [top, top, top | 2, top | 1, 0, 0]);
}

#[test]
fn faults_are_named_wherever_they_lie() {
    let Some(device) = device() else { return };
    for vocab in [1, 32, 1024, 3000] {
        for at in [0, vocab / 2, vocab - 1] {
            for temperature in [0.0, 1.0] {
                let how = SampleRow { temperature, ..SampleRow::GREEDY };
                let mut logits = vec![0.5; 2 * vocab];
                logits[at] = f32::NAN;
                logits[vocab + at] = f32::INFINITY;
                logits.extend(vec![f32::NEG_INFINITY; 2 * vocab]);
                logits[3 * vocab + at] = -3.0;
                let got = draw(&device, &mut logits, vocab, &[how; 4]);
                let faults: Vec<u32> = got.iter().map(|g| g.1).collect();
                assert_eq!(faults, [1, 1, 2, 0], "{:?}", Fault::NotANumber);
                assert_eq!(got[3].0, at as u32);
            }
        }
    }
}

#[test]
fn log_probabilities_and_ranks_are_those_of_the_raw_row() {
    let Some(device) = device() else { return };
    let mut random = Random::new(7);
    for vocab in [1, 5, 257, 3000, 102_400] {
        let (rows, most) = (3, 20);
        let logits: Vec<f32> =
            random.vector(rows * vocab).iter().map(|x| (x * 40.0).round() / 4.0).collect();
        let chosen: Vec<u32> = (0..rows).map(|_| random.below(vocab) as u32).collect();
        let wanted = [20_u32, 0, UNWANTED];
        let sent = device.send(&logits);
        let lists = [device.send(&chosen), device.send(&wanted)];
        let out = device.send(&vec![TokenLogprob::default(); rows * (1 + most)]);
        let operands = Logprobs {
            logits: &sent,
            vocab,
            chosen: &lists[0],
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
                assert_eq!((entry.token, entry.rank), (e.token, e.rank), "{vocab}");
                assert!((entry.logprob - e.logprob).abs() <= 1e-5, "{entry:?} {e:?}");
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
