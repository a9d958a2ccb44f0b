//! Draws of 64 rows over Qwen3's vocabulary: greedy, with every parameter on, and log-probabilities.

use crate::case::{Case, Check, Launch, Ready, Work};
use crate::near::{Failure, equal, near, some};
use crate::rig::{Random, Rig, cold_sets};
use device::cuda::DeviceSlice;
use ops::cuda::{Dtype, Rows};
use ops::sample::cuda::{Logprobs, Sample, SampleRow, greedy, logprobs, sample};
use ops::sample::{LogSoftmax, Params, Seen, Workspace};

const VOCAB: usize = 151_936;
const ROWS: usize = 64;
/// Biased and banned tokens of a row, and tokens it has seen.
const LISTED: usize = 8;
const SEEN: usize = 500;
/// Likeliest tokens of a row.
const LIKELIEST: usize = 20;
/// Rows that are drawn on the host too.
const CHECKED: usize = 3;

pub(super) fn cases() -> Vec<Case> {
    let name = |what: &str| format!("sample.{what}.bs{ROWS}.vocab{VOCAB}");
    vec![
        Case::new(name("greedy"), likeliest),
        Case::new(name("temperature"), |rig| draws(rig, false)),
        Case::new(name("everything"), |rig| draws(rig, true)),
        Case::new(name("logprobs"), described),
    ]
}

/// Logits of several sets, spread as those of a model are.
fn logits(rig: &mut Rig) -> Result<Vec<DeviceSlice>, Failure> {
    (0..cold_sets(ROWS * VOCAB * 4)).map(|_| rig.normal_f32(ROWS * VOCAB, 2.5)).collect()
}

fn row_of(rig: &Rig, logits: &DeviceSlice, row: usize) -> Result<Vec<f32>, Failure> {
    rig.floats(logits, row * VOCAB..(row + 1) * VOCAB, Dtype::F32)
}

fn likeliest(rig: &mut Rig) -> Result<Ready, Failure> {
    let logits = logits(rig)?;
    let (tokens, faults) = (rig.space(ROWS * 4)?, rig.space(ROWS * 4)?);
    let (first, drawn, sets) = (logits[0].clone(), tokens.clone(), logits.len());
    let launch: Launch = Box::new(move |on, i| {
        greedy(on, Rows::exactly(ROWS), VOCAB, &logits[i], (&tokens, &faults))
    });
    let check: Check = Box::new(move |rig, launch| {
        rig.poison(&drawn)?;
        rig.run(launch, 0)?;
        let drawn = rig.words(&drawn)?;
        // An error in one lane of many would be missed by few.
        for (row, drawn) in drawn.iter().enumerate() {
            let logits = row_of(rig, &first, row)?;
            // The first of equal ones.
            let best = (0..VOCAB).rev().max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
            equal(&format!("row {row}"), &[*drawn as usize], &[best.unwrap_or(VOCAB)])?;
        }
        Ok(())
    });
    Ok(Ready { work: Work::bytes(ROWS * VOCAB * 4), sets, launch, check })
}

/// What a row asks for.
struct Lists {
    bias: Vec<(u32, f32)>,
    banned: Vec<u32>,
    seen: Vec<u32>,
}

fn draws(rig: &mut Rig, everything: bool) -> Result<Ready, Failure> {
    let logits = logits(rig)?;
    let mut random = Random::new(8);
    let mut token = move || random.below(VOCAB) as u32;
    let mut list = |len: usize| {
        let mut all: Vec<u32> = (0..len).map(|_| token()).collect();
        all.sort_unstable();
        all.dedup();
        all
    };
    let mut rows = Vec::new();
    let mut lists = Vec::new();
    let (mut bias, mut banned) = (Vec::new(), Vec::new());
    for row in 0..ROWS as u32 {
        let plain = SampleRow {
            seed: u64::from(row) * 77 + 1,
            temperature: 0.9,
            position: row,
            slot: row,
            ..SampleRow::GREEDY
        };
        let of = if everything {
            Lists {
                bias: list(LISTED).into_iter().map(|token| (token, 1.5)).collect(),
                banned: list(LISTED),
                seen: list(SEEN),
            }
        } else {
            Lists { bias: Vec::new(), banned: Vec::new(), seen: Vec::new() }
        };
        let how = SampleRow {
            top_p: 0.95,
            min_p: 0.01,
            repetition: 1.1,
            frequency: 0.2,
            presence: 0.1,
            top_k: 200,
            bias_start: bias.len() as u32,
            bias_count: of.bias.len() as u32,
            banned_start: banned.len() as u32,
            banned_count: of.banned.len() as u32,
            ..plain
        };
        rows.push(if everything { how } else { plain });
        bias.extend(&of.bias);
        banned.extend(&of.banned);
        lists.push(of);
    }
    let words: Vec<u32> = rows.iter().flat_map(SampleRow::words).collect();
    let how = rig.u32s(&words)?;
    let mut counts = vec![0_u32; if everything { ROWS * VOCAB } else { 0 }];
    for (row, of) in lists.iter().enumerate() {
        of.seen.iter().for_each(|token| counts[row * VOCAB + *token as usize] = 1);
    }
    let seen = rig.u32s(&counts)?;
    bias.push((0, 0.0));
    banned.push(0);
    let bias_tokens = rig.u32s(&bias.iter().map(|b| b.0).collect::<Vec<_>>())?;
    let bias_values = rig.f32s(&bias.iter().map(|b| b.1).collect::<Vec<_>>())?;
    let banned = rig.u32s(&banned)?;
    let (tokens, faults) = (rig.space(ROWS * 4)?, rig.space(ROWS * 4)?);
    let (first, drawn, sets) = (logits[0].clone(), tokens.clone(), logits.len());
    let launch: Launch = Box::new(move |on, i| {
        let operands = Sample {
            logits: &logits[i],
            vocab: VOCAB,
            how: &how,
            seen: everything.then_some(&seen),
            bias: everything.then_some((&bias_tokens, &bias_values)),
            banned: everything.then_some(&banned),
            tokens: &tokens,
            faults: &faults,
        };
        sample(on, Rows::exactly(ROWS), &operands)
    });
    let check: Check = Box::new(move |rig, launch| {
        rig.poison(&drawn)?;
        rig.run(launch, 0)?;
        let drawn = rig.words(&drawn)?;
        for row in some(ROWS, CHECKED) {
            let expected = on_host(row_of(rig, &first, row)?, &rows[row], &lists[row]);
            equal(&format!("row {row}"), &[Some(drawn[row])], &[expected])?;
        }
        Ok(())
    });
    let bytes = ROWS * VOCAB * if everything { 8 } else { 4 };
    Ok(Ready { work: Work::bytes(bytes), sets, launch, check })
}

/// The token that the processor draws.
fn on_host(mut logits: Vec<f32>, how: &SampleRow, lists: &Lists) -> Option<u32> {
    let mut seen = Seen::none();
    lists.seen.iter().for_each(|token| {
        seen.prompt(*token);
        seen.output(*token);
    });
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
        seen: &seen,
        bias: &lists.bias,
        banned: &lists.banned,
    };
    ops::sample::sample(&mut logits, &params, &mut Workspace::new(VOCAB)).ok()
}

fn described(rig: &mut Rig) -> Result<Ready, Failure> {
    let logits = logits(rig)?;
    let chosen = rig.u32s(&[77; ROWS])?;
    let wanted = rig.u32s(&[LIKELIEST as u32; ROWS])?;
    let out = rig.space(ROWS * (1 + LIKELIEST) * 12)?;
    let (first, result, sets) = (logits[0].clone(), out.clone(), logits.len());
    let launch: Launch = Box::new(move |on, i| {
        let operands = Logprobs {
            logits: &logits[i],
            vocab: VOCAB,
            chosen: &chosen,
            given: None,
            wanted: &wanted,
            most: LIKELIEST,
            out: &out,
        };
        logprobs(on, Rows::exactly(ROWS), &operands)
    });
    let check: Check = Box::new(move |rig, launch| {
        rig.poison(&result)?;
        rig.run(launch, 0)?;
        let words = rig.words(&result)?;
        for row in some(ROWS, CHECKED) {
            let logits = row_of(rig, &first, row)?;
            let softmax = LogSoftmax::of(&logits);
            let mut expected = vec![softmax.token(&logits, 77)];
            let mut top = Vec::new();
            softmax.top(&logits, LIKELIEST, &mut top);
            expected.extend(top);
            let got = words.chunks_exact(3).skip(row * (1 + LIKELIEST)).take(1 + LIKELIEST);
            for (got, expected) in got.zip(expected) {
                equal(&format!("row {row}"), &[got[0], got[2]], &[expected.token, expected.rank])?;
                let logprob = f64::from(expected.logprob);
                near(&format!("row {row}"), &[f32::from_bits(got[1])], &[logprob], 1e-5)?;
            }
        }
        Ok(())
    });
    Ok(Ready { work: Work::bytes(ROWS * VOCAB * 4), sets, launch, check })
}
