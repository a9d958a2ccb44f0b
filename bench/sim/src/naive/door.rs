//! Who is taken into the line, and who is turned away.
//!
//! Nobody is let in here. Invariant: whoever is taken can run, if only alone.

use super::group::Group;
use super::{Naive, Phase, Req, State, Taken};
use core::time::Duration;
use ids::{Timestamp, Tokens};
use scheduler::{FinishReason, Refusal, Submit, Unfit};

/// Positions that will ever be written: the last token of the output is not.
pub(super) fn limit(submit: &Submit) -> u32 {
    submit.prompt.len() as u32 + submit.max_tokens.0.max(1) - 1
}

impl Naive {
    /// Takes a request into line.
    pub(super) fn take(&mut self, submit: &Submit, order: u64) {
        self.requests.push(Req {
            submit: submit.clone(),
            order,
            output: Vec::new(),
            state: State::Waiting { ran: false },
            cached: None,
            gave_way: false,
            uploaded: 0,
            deaths: 0,
            danger: 0,
            untold: 1,
        });
        self.upload(submit.request);
    }

    pub(super) fn acceptable(&self, now: Timestamp, submit: &Submit) -> Result<(), Refusal> {
        let prompt = Tokens(submit.prompt.len() as u32);
        let (max_tokens, max_context) = (submit.max_tokens, self.config.max_context);
        if prompt.is_zero() {
            return Err(Refusal::EmptyPrompt);
        }
        if prompt.0 + max_tokens.0 > max_context.0 {
            return Err(Refusal::TooLong { prompt, max_tokens, max_context });
        }
        if submit.deadline.is_some_and(|at| at <= now) {
            return Err(Refusal::DeadlinePassed);
        }
        self.too_large(submit).map_or(Ok(()), Err)
    }

    /// Why a request cannot run even alone.
    pub(super) fn too_large(&self, submit: &Submit) -> Option<Refusal> {
        let tokens = limit(submit);
        let (need, have) = self.life.as_ref()?.cache.supers_for(tokens);
        (need > have).then_some(Refusal::CacheTooSmall { tokens: Tokens(tokens), need, have })
    }
}

impl Group {
    pub(super) fn submit(&mut self, now: Timestamp, submit: &Submit) -> Taken {
        let request = submit.request;
        if let Some(home) = self.home(request) {
            self.shards[home].expire(now);
            return Err(Unfit::DuplicateRequest);
        }
        self.shards.iter_mut().for_each(|shard| shard.expire(now));
        let room = self.shards[0].acceptable(now, submit).and_then(|()| self.shed_for(submit));
        if let Err(reason) = room {
            self.refuse(request, reason);
            return Ok(());
        }
        let home = self.place(submit);
        self.shards[home].take(submit, self.submitted);
        self.submitted += 1;
        Ok(())
    }

    /// Turns the last of the worst class away for one of a better class while the queue is full.
    fn shed_for(&mut self, submit: &Submit) -> Result<(), Refusal> {
        let prompt = submit.prompt.len() as u64;
        let Some(full) = self.full(prompt) else { return Ok(()) };
        let worst = self.queued().map(|(_, r)| r.submit.priority).max();
        let worst = worst.filter(|worst| *worst > submit.priority).ok_or(full)?;
        if prompt > self.config.queue_tokens {
            return Err(full);
        }
        while let Some(full) = self.full(prompt) {
            let of_class = self.queued().filter(|(_, r)| r.submit.priority == worst);
            let last = of_class.max_by_key(|(_, r)| r.rank()).map(|(at, r)| (at, r.id()));
            let (home, last) = last.ok_or(full)?;
            let wait = Duration::ZERO;
            self.shards[home].end_waiting(last, FinishReason::Refused(Refusal::Shed { wait }));
        }
        Ok(())
    }

    /// Those who never ran, wherever they wait.
    fn queued(&self) -> impl Iterator<Item = (usize, &Req)> {
        let all = self.shards.iter().enumerate();
        all.flat_map(|(at, shard)| shard.requests.iter().map(move |r| (at, r)))
            .filter(|(_, r)| r.phase() == Phase::Queued)
    }

    /// Why the queue does not take a prompt of so many tokens.
    fn full(&self, prompt: u64) -> Option<Refusal> {
        let (requests, limit) = (self.queued().count() as u32, self.config.queue_requests);
        let wait = Duration::ZERO;
        if requests >= limit {
            return Some(Refusal::QueueFull { waiting: requests, limit, wait });
        }
        let waiting: u64 = self.queued().map(|(_, r)| r.submit.prompt.len() as u64).sum();
        let limit = self.config.queue_tokens;
        let prompt_tokens = Tokens(prompt as u32);
        let refusal = Refusal::QueueTokens { waiting, prompt: prompt_tokens, limit, wait };
        (waiting + prompt > limit).then_some(refusal)
    }
}
