//! The door to the line: room in a full queue, and deadlines that are out of reach.
//!
//! A full queue gives up the newest request of whoever has most in it for one that deserves the place
//! more. A request whose deadline could not be met even if it ran now is ended rather than run: when
//! it comes, when it is the last moment to begin, and when its turn comes. Forecasts are those of
//! [`crate::policy::outlook`]; without one nobody is refused.
//!
//! Invariant: nobody who was given a token or better class gives way, and a request is told when to
//! come again.

use crate::event::Submit;
use crate::job::Job;
use crate::output::{FinishReason, Refusal};
use crate::request::Live;
use crate::scheduler::Scheduler;
use crate::slab::Key;
use core::time::Duration;
use ids::{Timestamp, Tokens};

impl Scheduler {
    /// Makes room in the queue for a request.
    pub(crate) fn make_room(&mut self, submit: &Submit) -> Result<(), Refusal> {
        let prompt = u32::try_from(submit.prompt.len()).map_or(Tokens(u32::MAX), Tokens);
        let Err(full) = self.queue_takes(prompt) else { return Ok(()) };
        if u64::from(prompt.0) > self.config.queue_tokens {
            return Err(full);
        }
        let class = self.line.makes_room(submit.priority, submit.tenant, prompt).ok_or(full)?;
        while let Err(full) = self.queue_takes(prompt) {
            let key = self.line.gives_way(class).ok_or(full)?;
            let wait = self.queue_lasts();
            self.counters.shed += 1;
            self.finish_waiting(key, FinishReason::Refused(Refusal::Shed { wait }));
        }
        Ok(())
    }

    fn queue_takes(&self, prompt: Tokens) -> Result<(), Refusal> {
        let (_, queued, tokens) = self.line.len();
        let (wait, limit) = (self.queue_lasts(), self.config.queue_requests);
        if queued >= limit {
            return Err(Refusal::QueueFull { waiting: queued, limit, wait });
        }
        let limit = self.config.queue_tokens;
        if tokens + u64::from(prompt.0) > limit {
            return Err(Refusal::QueueTokens { waiting: tokens, prompt, limit, wait });
        }
        Ok(())
    }

    /// When those who are turned away now may try again.
    pub(crate) fn queue_lasts(&self) -> Duration {
        const LEAST: Duration = Duration::from_secs(1);
        const MOST: Duration = Duration::from_secs(60);
        let (_, _, tokens) = self.line.len();
        self.outlook.drain_time(tokens).unwrap_or(LEAST).clamp(LEAST, MOST)
    }

    /// Sets when the deadline of a request is looked at: when it would have to begin while it never
    /// ran, else when it passes.
    pub(crate) fn set_alarm(&mut self, now: Timestamp, key: Key) -> Result<(), Refusal> {
        let Some(live) = self.requests.get(key) else { return Ok(()) };
        let Some(deadline) = live.job().deadline else { return Ok(()) };
        let mut at = deadline;
        if let Live::Queued(request) = live
            && let Some(needs) = self.needs(&request.job, Tokens::ZERO)
        {
            let left = deadline.since(now);
            if needs >= left {
                return Err(self.out_of_reach(needs, left));
            }
            at = now.after(left - needs);
        }
        self.deadlines.insert((at, key));
        if let Some(live) = self.requests.get_mut(key) {
            live.job_mut().alarm = Some(at);
        }
        Ok(())
    }

    /// How a request ends instead of getting a seat now, with so many tokens of its prompt to compute.
    pub(crate) fn too_late(
        &mut self,
        now: Timestamp,
        key: Key,
        prompt: Tokens,
    ) -> Option<FinishReason> {
        let live = self.requests.get(key)?;
        let left = live.job().deadline?.since(now);
        let needs = self.needs(live.job(), prompt).filter(|needs| *needs >= left)?;
        match live {
            Live::Queued(_) => Some(FinishReason::Refused(self.out_of_reach(needs, left))),
            _ => Some(FinishReason::Deadline),
        }
    }

    fn out_of_reach(&mut self, needs: Duration, left: Duration) -> Refusal {
        self.counters.unreachable += 1;
        Refusal::DeadlineUnreachable { needs, left, wait: self.queue_lasts() }
    }

    /// From its seat to its end, as far as can be foreseen.
    fn needs(&self, job: &Job, prompt: Tokens) -> Option<Duration> {
        if !self.config.refuse_late {
            return None;
        }
        let (least, most) = job.to_come();
        // Where others wait, the seat is for one that will make it; where nobody does, trying is free.
        let output = if self.line.len().0 > 1 {
            self.outlook.large_output(least, most)
        } else {
            self.outlook.likely_output(least, most)
        };
        let decode = self.outlook.decode_time(output)?;
        Some(decode.saturating_add(self.cost.prefill_time(prompt.0)))
    }
}
