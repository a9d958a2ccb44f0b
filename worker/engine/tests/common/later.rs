//! Chunks behind a context in steps that repeat: the first of a kind is launched, the others are captured.

use super::{Completion, Model, Session, Setup, greedy, native, prompt};
use engine::KvDtype;
use std::collections::BTreeMap;
use step::SampleFault;

/// What came back by request; of each step how many launches it took, whether it was one of those that are not
/// captured, and how many kinds are.
struct Got {
    done: Vec<Completion>,
    faults: Vec<bool>,
    launches: Vec<u32>,
    uncaptured: Vec<bool>,
    graphs: Vec<u32>,
}

/// Runs steps of these chunks, by slot, over prompts that were admitted in the order of their slots.
fn run(session: &mut Session, prompts: &[Vec<u32>], steps: &[&[(u32, u32)]]) -> Got {
    let first = u64::from(session.generations) + 1;
    for (slot, tokens) in (0..).zip(prompts) {
        session.admit(slot, tokens, tokens.len(), greedy());
    }
    let mut got = Got {
        done: prompts.iter().map(|_| Completion::default()).collect(),
        faults: vec![false; prompts.len()],
        launches: Vec::new(),
        uncaptured: Vec::new(),
        graphs: Vec::new(),
    };
    for chunks in steps {
        let outcome = session.step(chunks);
        got.launches.push(outcome.timing.launches);
        got.uncaptured.push(outcome.timing.uncaptured);
        got.graphs.push(outcome.timing.graphs);
        for part in outcome.prompt_logprobs {
            let done = &mut got.done[(part.request.0 - first) as usize];
            done.prompt.extend(part.entries.iter().map(|entry| entry.chosen.logprob));
        }
        for sampled in outcome.sampled {
            let slot = sampled.slot.index();
            got.faults[slot] |= sampled.fault == Some(SampleFault::NotANumber);
            got.done[slot].tokens.push(sampled.token.0);
            got.done[slot].logprobs.extend(sampled.logprobs.map(|of| of.chosen.logprob));
        }
    }
    (0..).zip(prompts).for_each(|(slot, _)| session.retire(slot));
    got
}

/// Models whose latent attention gathers keys, for longer contexts than others here.
fn models() -> impl Iterator<Item = (&'static str, Model)> {
    let latent = native().into_iter().filter(|(name, _)| name.contains("deepseek"));
    latent.map(|(name, mut config)| {
        config["max_position_embeddings"] = 16_384.into();
        (name, Model::new(&config, 33))
    })
}

/// Steps with one to three later chunks beside decodes and a whole prompt, several of each kind, of which
/// contexts grow over what products are padded to.
const STEPS: [&[(u32, u32)]; 12] = [
    &[(0, 40), (1, 64)],
    &[(0, 60), (1, 64)],
    &[(0, 60), (1, 64)],
    &[(0, 40), (1, 32), (2, 50)],
    &[(1, 476), (2, 50), (3, 30)],
    &[(1, 80), (2, 50)],
    &[(1, 90), (2, 40)],
    &[(1, 100), (2, 33)],
    &[(1, 100), (2, 277)],
    &[(1, 100), (2, 40), (4, 20)],
    &[(2, 40), (4, 9)],
    &[],
];
const LENGTHS: [usize; 5] = [200, 1170, 580, 30, 29];

/// Captured steps have the very bits of launched ones, and take few launches.
pub fn captured_equal_launched(device: Setup) {
    let setup = Setup { kv_dtype: KvDtype::Bf16, slots: 6, context: 1280, ..device };
    for (name, model) in models() {
        let prompts: Vec<_> = (50..).zip(LENGTHS).map(|(seed, len)| prompt(len, seed)).collect();
        let all = |graphs| {
            let mut session = model.session(Setup { graphs, ..setup });
            session.prompt_logprobs = None;
            // The second time every kind is there.
            let both = [0; 2].map(|_| run(&mut session, &prompts, &STEPS));
            (both, session.engine.captured())
        };
        let ([launched, again], none) = all(false);
        let ([first, second], captured) = all(true);
        assert!(none.is_empty() && captured.iter().any(|of| of.later), "{name}");
        assert_eq!(launched.done, again.done, "{name}");
        for got in [&first, &second] {
            assert_eq!(got.done, launched.done, "{name}");
            assert!(!got.faults.contains(&true), "{name}");
        }
        let pairs = second.launches.iter().zip(&launched.launches);
        for (step, (captured, launched)) in pairs.enumerate() {
            assert!(captured + 10 < *launched, "{name}, step {step}: {captured} of {launched}");
        }
        let told = |got: &Got| got.uncaptured.iter().filter(|of| **of).count();
        let made = second.graphs[0] - first.graphs[0];
        assert_eq!((told(&launched), told(&second)), (0, 0), "{name}");
        assert!(made > 1 && told(&first) == made as usize, "{name}: {made}, {}", told(&first));
        assert!(launched.graphs.iter().all(|count| *count == 0), "{name}");
    }
}

/// Where a kind cannot be captured, its steps and those of other such kinds go on launch by launch.
pub fn a_failed_capture_is_said_and_steps_go_on(device: Setup) {
    let setup = Setup { kv_dtype: KvDtype::Bf16, slots: 6, context: 1280, graphs: true, ..device };
    let (name, model) = models().next().expect("a model");
    let prompts: Vec<_> = (50..).zip(LENGTHS).map(|(seed, len)| prompt(len, seed)).collect();
    let twice = |failing_launch| {
        let mut session = model.session(Setup { failing_launch, ..setup });
        session.prompt_logprobs = None;
        let both = [0; 2].map(|_| run(&mut session, &prompts, &STEPS));
        (both, session.engine.take_notes(), session.engine.captured())
    };
    let ([good, _], notes, _) = twice(None);
    let start = notes.iter().any(|note| note.contains("are set aside"));
    assert!(start && !notes.iter().any(|note| note.contains("cannot")), "{notes:?}");
    // The second step is the first with prompts behind a context. Launches of the other stream are counted,
    // and fewer than what is captured behind it.
    let at = good.launches[..2].iter().map(|count| u64::from(*count)).sum::<u64>() + 3;
    let (both, notes, captured) = twice(Some(at));
    let said: Vec<_> = notes.iter().filter(|note| note.contains("cannot be captured")).collect();
    assert!(said.len() == 1 && said[0].contains("LAUNCH_FAILED"), "{notes:?}");
    assert!(captured.iter().all(|of| !of.later) && !captured.is_empty());
    for got in both {
        assert_eq!(got.done, good.done, "{name}");
        assert!(!got.uncaptured[0] && got.uncaptured[1..5].iter().all(|of| *of), "{name}");
    }
}

/// More sequences than are gathered at once.
pub fn passes_are_captured(device: Setup) {
    let setup = Setup { kv_dtype: KvDtype::Bf16, slots: 3, context: 12_288, supers: 220, ..device };
    let chunks: Vec<Vec<(u32, u32)>> = (0..12)
        .flat_map(|_| (0..3).map(|slot| vec![(slot, 1000)]))
        .chain((0..2).map(|_| (0..3).map(|slot| (slot, 100)).collect()))
        .collect();
    let steps: Vec<&[(u32, u32)]> = chunks.iter().map(Vec::as_slice).collect();
    let (name, model) = models().next().expect("a model");
    let prompts: Vec<_> = (70..73).map(|seed| prompt(12_200, seed)).collect();
    let all = |graphs| {
        let mut session = model.session(Setup { graphs, ..setup });
        run(&mut session, &prompts, &steps)
    };
    let (captured, launched) = (all(true), all(false));
    assert_eq!(captured.done, launched.done, "{name}");
    let last = |of: &Got| of.launches.last().copied();
    assert!(last(&captured) < last(&launched), "{name}");
}

/// NaN in what one request has in the cache reaches none of the others that are gathered with it.
pub fn a_nan_ends_one_request(device: Setup) {
    const BAD: u32 = super::poison::POISON;
    let setup = Setup { kv_dtype: KvDtype::Bf16, slots: 6, context: 1280, graphs: true, ..device };
    for (name, model) in models() {
        let source = super::poison::source(&model);
        let clean: Vec<Vec<u32>> = (50..)
            .zip(LENGTHS)
            .map(|(seed, len)| prompt(len, seed).iter().map(|t| t % BAD).collect())
            .collect();
        let mut session = model.session_over(source, setup);
        session.prompt_logprobs = None;
        let mut results = BTreeMap::new();
        for bad in [None, Some(0), Some(1), Some(2), None] {
            let mut prompts = clean.clone();
            if let Some(bad) = bad {
                prompts[bad][20] = BAD;
            }
            let got = run(&mut session, &prompts, &STEPS);
            for slot in 0..prompts.len() {
                assert_eq!(got.faults[slot], bad == Some(slot), "{name}, {bad:?}, slot {slot}");
                if bad != Some(slot) {
                    let before = results.entry(slot).or_insert_with(|| got.done[slot].clone());
                    assert_eq!(got.done[slot], *before, "{name}, {bad:?}, slot {slot}");
                }
            }
        }
        assert!(session.engine.captured().iter().any(|of| of.later), "{name}");
    }
}
