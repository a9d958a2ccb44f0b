//! Teacher forcing: requests whose tokens are all given, so that what follows each can be compared
//! however the tokens before it would have been drawn.

use super::{Session, prompt};
use step::{Outcome, Sampling};

/// What a model says after a token that was given.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    pub likeliest: u32,
    /// How far it is ahead of the second.
    pub margin: f32,
    /// Of the next token that was given.
    pub logprob: f32,
}

/// A request: its tokens, of which the first `whole` run as one chunk and the others one by one, as
/// decodes do. The last is given for what is said before it alone.
pub struct Forced {
    pub tokens: Vec<u32>,
    pub whole: usize,
}

impl Forced {
    /// `most` requests of many lengths with `steps` single steps each.
    pub fn many(most: usize, steps: usize) -> Vec<Self> {
        let of = |i: usize| {
            let whole = 1 + i * 37 % 130;
            Self { tokens: prompt(whole + steps + 1, i as u32), whole }
        };
        (0..most).map(of).collect()
    }
}

/// Runs requests side by side: chunks first, as many to a step as fit, then all of them token by token.
pub fn together(session: &mut Session, requests: &[&Forced], tokens: u32) -> Vec<Vec<Verdict>> {
    let mut verdicts: Vec<Vec<Verdict>> = requests.iter().map(|_| Vec::new()).collect();
    // Requests are numbered as they are admitted.
    let first = u64::from(session.generations) + 1;
    let mut take = |outcome: Outcome| {
        for part in outcome.prompt_logprobs {
            let verdicts = &mut verdicts[(part.request.0 - first) as usize];
            assert_eq!(part.first.as_usize(), verdicts.len() + 1, "parts come in order");
            verdicts.extend(part.entries.iter().map(|entry| Verdict {
                likeliest: entry.top[0].token.0,
                margin: entry.top[0].logprob - entry.top[1].logprob,
                logprob: entry.chosen.logprob,
            }));
        }
    };
    for (slot, request) in (0_u32..).zip(requests) {
        let Forced { tokens, .. } = request;
        session.admit(slot, tokens, tokens.len(), Sampling::default());
    }
    let mut waiting = (0_u32..).zip(requests).peekable();
    while waiting.peek().is_some() {
        let mut left = tokens;
        let mut chunks = Vec::new();
        while let Some((slot, request)) = waiting.next_if(|(_, r)| r.whole as u32 <= left) {
            left -= request.whole as u32;
            chunks.push((slot, request.whole as u32));
        }
        take(session.step(&chunks));
    }
    let steps = requests.iter().map(|r| r.tokens.len() - 1 - r.whole).min().unwrap_or(0);
    let all: Vec<(u32, u32)> = (0..requests.len() as u32).map(|slot| (slot, 1)).collect();
    for _ in 0..steps {
        take(session.step(&all));
    }
    (0..requests.len() as u32).for_each(|slot| session.retire(slot));
    verdicts
}
