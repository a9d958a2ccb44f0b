//! Who is taken into the line, and who is turned away.
//!
//! Nobody is let in here. Invariant: whoever is taken can run, if only alone.

use super::{Naive, Phase, Req, State, Taken};
use ids::{Timestamp, Tokens};
use scheduler::{Output, Refusal, Submit, Unfit};

/// Positions that will ever be written: the last token of the output is not.
pub(super) fn limit(submit: &Submit) -> u32 {
    submit.prompt.len() as u32 + submit.max_tokens.0.max(1) - 1
}

impl Naive {
    pub(super) fn submit(&mut self, now: Timestamp, submit: &Submit) -> Taken {
        let request = submit.request;
        if self.find(request).is_some() {
            return Err(Unfit::DuplicateRequest);
        }
        if let Err(reason) = self.acceptable(now, submit) {
            self.say(Output::Refused { request, reason });
            return Ok(());
        }
        self.requests.push(Req {
            submit: submit.clone(),
            order: self.submitted,
            output: Vec::new(),
            state: State::Waiting { ran: false },
            cached: None,
            gave_way: false,
            uploaded: 0,
            deaths: 0,
            danger: 0,
            untold: 1,
        });
        self.submitted += 1;
        self.upload(request);
        Ok(())
    }

    fn acceptable(&self, now: Timestamp, submit: &Submit) -> Result<(), Refusal> {
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
        let queued: Vec<_> = self.requests.iter().filter(|r| r.phase() == Phase::Queued).collect();
        if queued.len() as u32 >= self.config.queue_requests {
            let limit = self.config.queue_requests;
            return Err(Refusal::QueueFull { waiting: queued.len() as u32, limit });
        }
        let waiting: u64 = queued.iter().map(|r| r.submit.prompt.len() as u64).sum();
        if waiting + u64::from(prompt.0) > self.config.queue_tokens {
            return Err(Refusal::QueueTokens { waiting, prompt, limit: self.config.queue_tokens });
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
