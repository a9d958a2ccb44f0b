//! Who comes and what they want: bursts, shared documents, odd lengths, every kind of limit.
//!
//! It does not know what becomes of a request. Invariant: what is drawn follows
//! from the world's random numbers and time alone, and no id is given twice.

use super::{Check, Happening, World, rank_of, token};
use crate::client::{Client, END};
use core::time::Duration;
use ids::{RequestId, TenantId, TokenId, Tokens};
use scheduler::{Event, FinishReason, Submit};
use step::Sampling;

impl World {
    pub(super) fn arrive(&mut self) -> Check {
        let pause = self.scenario.pause.as_nanos() as u64;
        let wait = Duration::from_nanos(self.rng.below(2 * pause));
        self.after(wait, Happening::Arrive);
        // Bursts are what fills queues.
        let many = if self.rng.one_in(12) { 1 + self.rng.below(10) } else { 1 };
        for _ in 0..many {
            self.submit()?;
        }
        Ok(())
    }

    fn submit(&mut self) -> Check {
        let request = RequestId(self.next_request);
        self.next_request += 1;
        let submit = self.make_request(request);
        let rng = &mut self.rng;
        let stop_at = rng.one_in(self.scenario.stops).then(|| {
            let at = 1 + rng.below_u32(30);
            (at, rng.below_u32(at + 1))
        });
        let abort = rng.one_in(self.scenario.aborts);
        let delay = Duration::from_micros(rng.below(1_500_000));
        let mut client = Client::new(submit.clone(), stop_at);
        if submit.deadline.is_some() {
            client.asked.push(FinishReason::Deadline);
        }
        self.unstarted.insert(rank_of(&client));
        self.clients.insert(request, client);
        self.figures.requests += 1;
        if abort {
            self.after(delay, Happening::Abort(request));
        }
        self.handle(Event::Submit(Box::new(submit.clone())))?;
        if self.rng.one_in(50) && self.clients.contains_key(&request) {
            // The id of a live request again: must change nothing.
            self.handle(Event::Submit(Box::new(submit)))?;
        }
        Ok(())
    }

    fn make_request(&mut self, request: RequestId) -> Submit {
        let rng = &mut self.rng;
        let scenario = &self.scenario;
        let shared = &self.documents[rng.below(self.documents.len() as u64) as usize];
        let lengths = [1, 2, 63, 64, 65, 128, 300];
        let prompt_len = if rng.one_in(4) {
            lengths[rng.below(lengths.len() as u64) as usize]
        } else {
            1 + rng.below_u32(scenario.prompt_most)
        };
        let kept = rng.below_u32(prompt_len + 1) as usize;
        let mut prompt = shared[..kept.min(shared.len())].to_vec();
        while prompt.len() < prompt_len as usize {
            prompt.push(token(rng));
        }
        let key = &scenario.config.hash_key;
        let root = key.root(b"");
        let mut hashes = key.chain_all(root, &prompt);
        if rng.one_in(5) {
            hashes.truncate(rng.below(hashes.len() as u64 + 1) as usize);
        }
        let sampling = Sampling { seed: rng.below(6), ..Sampling::default() };
        let deadline = rng
            .one_in(scenario.deadlines)
            .then(|| self.now.after(Duration::from_micros(1 + rng.below(2_000_000))));
        Submit {
            request,
            prompt: prompt.into(),
            prompt_hashes: hashes.into(),
            root,
            sampling: sampling.into(),
            max_tokens: Tokens(rng.below_u32(scenario.output_most)),
            end_tokens: [END].into(),
            ignore_eos: rng.one_in(3),
            stop_tokens: if rng.one_in(8) { [TokenId(5)].into() } else { [].into() },
            prompt_logprobs: rng.one_in(scenario.prompt_logprobs).then_some(0),
            priority: rng.below(3) as i32,
            tenant: TenantId(0),
            deadline,
            arrival: self.now,
        }
    }
}
