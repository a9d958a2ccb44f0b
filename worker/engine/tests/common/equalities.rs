//! What must not change a result: chunks, batch mates, block places, the form of latent attention,
//! a preemption.

use super::{Completion, Model, Setup, families, greedy, prompt};
use engine::MlaForm;
use std::collections::BTreeMap;
use step::Sampling;

const OUTPUT: usize = 8;

fn seeded(seed: u64) -> Sampling {
    Sampling {
        temperature: 0.9,
        top_p: 0.95,
        top_k: 40,
        seed,
        presence_penalty: 0.4,
        repetition_penalty: 1.1,
        ..greedy()
    }
}

pub fn chunks_of_any_size_equal_the_whole_prompt(base: Setup, tolerance: f32) {
    for (name, config) in families() {
        let model = Model::new(&config, 3);
        let tokens = prompt(150, 9);
        let mut session = model.session(base);
        let whole = session.complete(&tokens, 1024, OUTPUT, greedy());
        for chunk in [1, 63, 64, 65] {
            let got = session.complete(&tokens, chunk, OUTPUT, greedy());
            whole.assert_close(&got, tolerance, &format!("{name}, chunks of {chunk}"));
        }
    }
}

pub fn both_forms_of_latent_attention_agree(base: Setup, tolerance: f32) {
    for (name, config) in families().into_iter().filter(|(name, _)| name.starts_with("deepseek")) {
        let model = Model::new(&config, 4);
        let tokens = prompt(200, 2);
        let run = |form, chunk| {
            let setup = Setup { form, ..base };
            model.session(setup).complete(&tokens, chunk, OUTPUT, greedy())
        };
        let absorbed = run(MlaForm::Absorbed, 1024);
        for chunk in [1024, 65, 1] {
            let expanded = run(MlaForm::Expanded, chunk);
            absorbed.assert_close(&expanded, tolerance, &format!("{name}, chunks of {chunk}"));
        }
    }
}

pub fn places_of_blocks_do_not_matter(base: Setup) {
    for (name, config) in families() {
        let model = Model::new(&config, 5);
        let tokens = prompt(200, 4);
        let run = |scattered| {
            let setup = Setup { scattered, ..base };
            model.session(setup).complete(&tokens, 100, OUTPUT, greedy())
        };
        assert_eq!(run(true), run(false), "{name}");
    }
}

/// Requests of many lengths in one session, admitted a few at a time, in chunks among decodes.
fn batched(base: Setup, model: &Model, requests: &[(Vec<u32>, Sampling)]) -> Vec<Completion> {
    let mut session = model.session(base);
    let mut done: BTreeMap<u32, Completion> = BTreeMap::new();
    let mut left: BTreeMap<u32, u32> = BTreeMap::new();
    let mut waiting = 0..requests.len() as u32;
    let mut by_request = BTreeMap::new();
    let mut admitted = 0_u64;
    while done.len() < requests.len() || done.values().any(|d| d.tokens.len() < OUTPUT) {
        for slot in waiting.by_ref().take(5) {
            let (tokens, sampling) = &requests[slot as usize];
            session.admit(slot, tokens, tokens.len(), sampling.clone());
            admitted += 1;
            by_request.insert(admitted, slot);
            left.insert(slot, tokens.len() as u32);
            done.insert(slot, Completion::default());
        }
        let chunks: Vec<(u32, u32)> =
            left.iter().map(|(s, n)| (*s, (*n).min(47 + s % 3))).collect();
        for (slot, tokens) in &chunks {
            let remaining = left.get_mut(slot).expect("waiting");
            *remaining -= tokens;
            if *remaining == 0 {
                left.remove(slot);
            }
        }
        let mut outcome = session.step(&chunks);
        for part in outcome.prompt_logprobs.drain(..) {
            let done = done.get_mut(&by_request[&part.request.0]).expect("admitted");
            done.prompt.extend(part.entries.iter().map(|entry| entry.chosen.logprob));
        }
        for sampled in outcome.sampled {
            let done = done.get_mut(&sampled.slot.0).expect("admitted");
            assert_eq!(sampled.fault, None);
            if done.tokens.len() < OUTPUT {
                done.tokens.push(sampled.token.0);
                done.logprobs.extend(sampled.logprobs.map(|l| l.chosen.logprob));
            }
        }
    }
    done.into_values().collect()
}

pub fn a_batch_of_32_equals_one_by_one(base: Setup, tolerance: f32) {
    a_batch_of_32_equals_one_by_one_of(base, tolerance, usize::MAX);
}

/// As above, of the first `most` families.
pub fn a_batch_of_32_equals_one_by_one_of(base: Setup, tolerance: f32, most: usize) {
    for (name, config) in families().into_iter().take(most) {
        let model = Model::new(&config, 6);
        let requests: Vec<_> = (0..32)
            .map(|i| {
                let sampling = if i % 2 == 0 { greedy() } else { seeded(u64::from(i)) };
                (prompt(1 + (i as usize * 37) % 130, i), sampling)
            })
            .collect();
        let together = batched(base, &model, &requests);
        let mut session = model.session(base);
        for (at, ((tokens, sampling), got)) in requests.iter().zip(&together).enumerate() {
            let alone = session.complete(tokens, 1024, OUTPUT, sampling.clone());
            alone.assert_close(got, tolerance, &format!("{name}, request {at}"));
        }
    }
}

pub fn a_preempted_request_goes_on_as_if_undisturbed(base: Setup) {
    for (name, config) in families() {
        let model = Model::new(&config, 7);
        let tokens = prompt(70, 8);
        for sampling in [greedy(), seeded(5)] {
            let undisturbed = model.session(base).complete(&tokens, 1024, 12, sampling.clone());
            for at in [1, 5, 11] {
                let mut session = model.session(base);
                let before = session.complete(&tokens, 1024, at, sampling.clone());
                let known: Vec<u32> = tokens.iter().chain(&before.tokens).copied().collect();
                session.admit(3, &known, tokens.len(), sampling.clone());
                let mut after = Completion::default();
                after.take(session.step(&[(3, known.len() as u32)]));
                while after.tokens.len() + at < 12 {
                    after.take(session.step(&[]));
                }
                let joined: Vec<u32> = before.tokens.into_iter().chain(after.tokens).collect();
                assert_eq!(joined, undisturbed.tokens, "{name}, preempted after {at}");
                assert_eq!(after.prompt.len(), tokens.len() - 1, "{name}: output is no prompt");
            }
        }
    }
}

pub fn a_plan_without_effect_runs_nothing(base: Setup) {
    let (_, config) = families().remove(0);
    let outcome = Model::new(&config, 1).session(base).step(&[]);
    assert!(outcome.sampled.is_empty() && outcome.timing.tokens == 0);
}

pub fn the_same_session_has_the_same_digests_and_another_seed_has_not(base: Setup) {
    let (_, config) = families().remove(0);
    let model = Model::new(&config, 1);
    let digests = |seed| {
        let mut session = model.session(base);
        session.admit(0, &prompt(9, 1), 9, seeded(seed));
        let first = session.step(&[(0, 9)]).digest;
        (0..5).fold(vec![first], |mut all, _| {
            all.push(session.step(&[]).digest);
            all
        })
    };
    assert_eq!(digests(1), digests(1));
    assert_ne!(digests(1), digests(2));
}

pub fn a_shared_prefix_equals_a_cold_start(base: Setup, tolerance: f32) {
    for (name, config) in families() {
        let model = Model::new(&config, 8);
        let tokens = prompt(200, 6);
        let cold = model.session(base).complete(&tokens, 1024, OUTPUT, greedy());
        let mut session = model.session(base);
        // The first request's prompt ends elsewhere; three blocks are shared.
        let mut other = tokens[..192].to_vec();
        other.extend([1, 2, 3]);
        session.admit(0, &other, other.len(), greedy());
        session.step(&[(0, other.len() as u32)]);
        let shared: Vec<_> = session.blocks(0).iter().map(|blocks| blocks[..3].to_vec()).collect();
        // Position 192 sees 70 tokens at most where layers slide: block 0 is never read.
        session.admit_shared(1, &tokens, tokens.len(), greedy(), shared, 1);
        let mut warm = Completion::default();
        let mut outcome = session.step(&[(1, 8)]);
        let first = outcome.prompt_logprobs.pop().expect("the rest of the prompt");
        assert_eq!((first.first.0, first.entries.len()), (193, 7), "{name}");
        outcome.sampled.retain(|sampled| sampled.slot.0 == 1);
        warm.take(step::Outcome { prompt_logprobs: vec![], ..outcome });
        while warm.tokens.len() < OUTPUT {
            let mut outcome = session.step(&[]);
            outcome.sampled.retain(|sampled| sampled.slot.0 == 1);
            warm.take(outcome);
        }
        warm.prompt.clone_from(&cold.prompt);
        cold.assert_close(&warm, tolerance, name);
    }
}

/// Runs of one request alone are the same to the bit, whatever ran before, greedily and drawn.
pub fn runs_alone_are_one(base: Setup, model: &Model, runs: usize, name: &str) {
    let tokens = prompt(70, 8);
    let mut session = model.session(base);
    for sampling in [greedy(), seeded(5)] {
        let first = session.complete(&tokens, 1024, OUTPUT, sampling.clone());
        for run in 1..runs {
            if run % 10 == 0 {
                // Something else in between, which leaves other memory behind.
                session.complete(&prompt(33, run as u32), 16, 3, seeded(run as u64));
            }
            let again = session.complete(&tokens, 1024, OUTPUT, sampling.clone());
            assert_eq!(again, first, "{name}: run {run}");
        }
    }
}
