//! Steps that hold everything at once: decodes, later chunks, and prompts that lie in them as a whole.

use super::{Completion, Model, Session, Setup, greedy, prompt};

/// Requests of a mixed session, in the order of their slots.
pub const REQUESTS: usize = 6;

/// Runs six requests through mixed steps and some decodes behind them; what came back for each.
pub fn run(model: &Model, setup: Setup, what: &str) -> Vec<Completion> {
    let mut session = model.session(setup);
    let mut done: Vec<Completion> = (0..REQUESTS).map(|_| Completion::default()).collect();
    let lengths = [30, 300, 70, 1, 64, 129];
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
        session.admit(slot, &prompt(length, 40 + slot), length, greedy());
    }
    // One decodes from here on, one has a first chunk, which is no whole prompt.
    step(&mut session, &[(0, 30)]);
    step(&mut session, &[(1, 65)]);
    // A decode, a later chunk and four whole prompts, of one token, within a block, of one, over two.
    step(&mut session, &[(1, 100), (2, 70), (3, 1), (4, 64), (5, 129)]);
    // Decodes and later chunks; the last of one token, as decodes have.
    step(&mut session, &[(1, 134)]);
    step(&mut session, &[(1, 1)]);
    for _ in 0..6 {
        step(&mut session, &[]);
    }
    done
}
