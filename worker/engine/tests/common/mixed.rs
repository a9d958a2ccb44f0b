//! Steps that hold everything at once: decodes, later chunks, and prompts that lie in them as a whole.

use super::{Completion, Model, Session, Setup, greedy, prompt};
use step::Sampling;

/// Requests of a mixed session, in the order of their slots.
pub const REQUESTS: usize = 7;

/// Runs all requests through mixed steps and some decodes behind them; what came back for each.
pub fn run(model: &Model, setup: Setup, what: &str) -> Vec<Completion> {
    run_with(model, setup, (Some(2), greedy()), what)
}

/// The same for requests that ask for so many likeliest tokens of their prompts, and for these draws.
pub fn run_with(
    model: &Model,
    setup: Setup,
    (listed, sampling): (Option<u8>, Sampling),
    what: &str,
) -> Vec<Completion> {
    let mut session = model.session(setup);
    session.prompt_logprobs = listed;
    let mut done: Vec<Completion> = (0..REQUESTS).map(|_| Completion::default()).collect();
    let lengths = [30, 300, 70, 1, 64, 129, 50];
    let first = u64::from(session.generations) + 1;
    let mut step = |session: &mut Session, chunks: &[(u32, u32)]| {
        let mut outcome = session.step(chunks);
        for part in outcome.prompt_logprobs.drain(..) {
            let done = &mut done[(part.request.0 - first) as usize];
            done.prompt.extend(part.entries.iter().map(|entry| entry.chosen.logprob));
        }
        for sampled in outcome.sampled {
            let at = done[sampled.slot.index()].tokens.len();
            assert_eq!(sampled.fault, None, "{what}: slot {}, token {at}", sampled.slot);
            let done = &mut done[sampled.slot.index()];
            done.tokens.push(sampled.token.0);
            done.logprobs.extend(sampled.logprobs.map(|logprobs| logprobs.chosen.logprob));
        }
    };
    for (slot, length) in (0_u32..).zip(lengths) {
        session.admit(slot, &prompt(length, 40 + slot), length, sampling.clone());
    }
    // A chunk of a step in which nobody draws.
    step(&mut session, &[(6, 20)]);
    // One decodes from here on, one has a first chunk, which is no whole prompt.
    step(&mut session, &[(0, 30)]);
    step(&mut session, &[(1, 65)]);
    // A decode, a later chunk and four whole prompts, of one token, within a block, of one, over two.
    step(&mut session, &[(1, 100), (2, 70), (3, 1), (4, 64), (5, 129)]);
    // Decodes and later chunks; the last of one token, as decodes have.
    step(&mut session, &[(1, 134), (6, 30)]);
    step(&mut session, &[(1, 1)]);
    for _ in 0..6 {
        step(&mut session, &[]);
    }
    done
}
