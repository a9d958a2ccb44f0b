//! The door to the line: room in a full queue, and deadlines that are out of reach.
//!
//! A full queue gives up the newest request of whoever has most in it for one that deserves the place
//! more. A request whose deadline could not be met even if it ran now is ended rather than run: when
//! it comes, when it is the last moment to begin, and when its turn comes. Forecasts are those of
//! [`crate::policy::outlook`]; without one nobody is refused.
//!
//! Invariant: nobody who was given a token or better class gives way, and a request is told when to
//! come again.

use crate::config::Config;
use crate::crowd::Crowd;
use crate::event::Submit;
use crate::job::Job;
use crate::output::{FinishReason, Refusal};
use crate::request::Live;
use crate::scheduler::Scheduler;
use crate::slab::Key;
use core::time::Duration;
use ids::{Timestamp, Tokens};
use std::borrow::Cow;

/// Makes room for a request in the queue, which these shards have together.
pub(crate) fn make_room(shards: &mut [Scheduler], submit: &Submit) -> Result<(), Refusal> {
    let prompt = u32::try_from(submit.prompt.len()).map_or(Tokens(u32::MAX), Tokens);
    let Err(full) = queue_takes(shards, prompt) else { return Ok(()) };
    if shards.first().is_none_or(|shard| u64::from(prompt.0) > shard.config.queue_tokens) {
        return Err(full);
    }
    let crowd = crowd(shards).ok_or(full)?;
    let class = crowd.makes_room(submit.priority, submit.tenant, prompt).ok_or(full)?;
    while let Err(full) = queue_takes(shards, prompt) {
        let (at, key) = gives_way(shards, class).ok_or(full)?;
        let wait = queue_lasts(shards);
        let shard = &mut shards[at];
        shard.counters.shed += 1;
        shard.finish_waiting(key, FinishReason::Refused(Refusal::Shed { wait }));
    }
    Ok(())
}

fn queue_takes(shards: &[Scheduler], prompt: Tokens) -> Result<(), Refusal> {
    let Some(Config { queue_requests, queue_tokens, .. }) = shards.first().map(Scheduler::config)
    else {
        return Ok(());
    };
    let (mut queued, mut tokens) = (0, 0);
    for shard in shards {
        let (_, requests, prompts) = shard.line.len();
        queued += requests;
        tokens += prompts;
    }
    if queued >= *queue_requests {
        let wait = queue_lasts(shards);
        return Err(Refusal::QueueFull { waiting: queued, limit: *queue_requests, wait });
    }
    if tokens + u64::from(prompt.0) > *queue_tokens {
        let (limit, wait) = (*queue_tokens, queue_lasts(shards));
        return Err(Refusal::QueueTokens { waiting: tokens, prompt, limit, wait });
    }
    Ok(())
}

/// What of the queue is whose. Several shards are counted anew, which only a full queue needs.
fn crowd(shards: &[Scheduler]) -> Option<Cow<'_, Crowd>> {
    let mut lines = shards.iter().map(|shard| shard.line.crowd());
    let first = Cow::Borrowed(lines.next()?);
    Some(lines.fold(first, |mut all, one| {
        all.to_mut().join(one);
        all
    }))
}

/// Who of a class gives way first, and in which shard: the last to come of the tenant that has most in
/// line.
fn gives_way(shards: &[Scheduler], class: i32) -> Option<(usize, Key)> {
    let (_, tenant) = crowd(shards)?.largest(class)?;
    let last = shards.iter().enumerate().filter_map(|(at, shard)| {
        let (when, key) = shard.line.last_of(class, tenant)?;
        Some((when, at, key))
    });
    last.max_by_key(|(when, ..)| *when).map(|(_, at, key)| (at, key))
}

/// When those who are turned away now may try again: when the queue of the slowest shard is over.
fn queue_lasts(shards: &[Scheduler]) -> Duration {
    shards.iter().map(Scheduler::queue_lasts).max().unwrap_or_default()
}

impl Scheduler {
    /// When those who are turned away now may try again.
    fn queue_lasts(&self) -> Duration {
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
