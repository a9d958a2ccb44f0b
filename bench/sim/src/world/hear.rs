//! What the scheduler says, taken by those it is said to.
//!
//! It answers nothing at once. Invariant: every output is the model's, and one that its client can
//! justify.

use super::{Check, Happening, Rank, World, rank_of};
use crate::client::Client;
use crate::rng::{Rng, chain};
use core::time::Duration;
use ids::{RequestId, ShardId, TokenId};
use scheduler::{FinishReason, Output, Refusal, Usage, WorkerFault};
use step::ToWorker;

/// Ended requests that are remembered.
const ENDED_KEPT: usize = 64;

/// The model foresees nothing, and says so to those it turns away.
fn without_forecast(mut output: Output) -> Output {
    if let Output::Refused { reason, .. }
    | Output::Finished { reason: FinishReason::Refused(reason), .. } = &mut output
        && let Refusal::QueueFull { wait, .. }
        | Refusal::QueueTokens { wait, .. }
        | Refusal::Shed { wait } = reason
    {
        *wait = Duration::ZERO;
    }
    output
}

impl World {
    pub(super) fn drain(&mut self) -> Check {
        loop {
            let output = self.shards.poll_output();
            let output = output.map(|(shard, output)| (shard.index(), without_forecast(output)));
            let wanted = self.model.poll_output();
            self.same("output", &output, &wanted)?;
            let Some((shard, output)) = output else {
                // Nothing, unless the two went apart and are not compared.
                while self.model.poll_output().is_some() {}
                return Ok(());
            };
            self.figures.outputs += 1;
            self.note_output(&output);
            self.story.said(self.now, &output);
            self.hear(ShardId(shard as u16), output)?;
        }
    }

    fn hear(&mut self, shard: ShardId, output: Output) -> Check {
        match output {
            Output::Upload(upload) => self.ranks.command(shard, &ToWorker::Upload(upload)),
            Output::Forget(incarnation, request) => {
                self.ranks.command(shard, &ToWorker::Forget(incarnation, request))
            }
            Output::Started { request, cached } => {
                let client = self.client(request)?;
                client.started(cached).map_err(|what| format!("{request}: {what}"))?;
                let (rank, arrival) = (rank_of(client), client.submit.arrival);
                let waited = self.now.since(arrival);
                self.figures.longest_wait = self.figures.longest_wait.max(waited);
                let first = self.first_of_line(request);
                if first != Some(rank) {
                    return Err(format!("{request} overtook {first:?}"));
                }
                self.unstarted.remove(&rank);
                Ok(())
            }
            Output::Token { request, token, .. } => self.hear_token(request, token),
            Output::PromptLogprobs(part) => {
                let request = part.request;
                let taken = self.client(request)?.prompt_part(&part);
                taken.map_err(|what| format!("{request}: {what}"))
            }
            Output::Finished { request, reason, usage } => self.hear_end(request, reason, usage),
            Output::Refused { request, .. } => {
                self.client(request)?;
                self.leave(request);
                self.figures.refused += 1;
                Ok(())
            }
            Output::RestartWorker { incarnation, reason } => {
                if !self.misbehaved {
                    return Err(format!("an honest worker is to be restarted: {reason}"));
                }
                self.justified(reason)?;
                self.after(Duration::from_millis(1), Happening::Die(incarnation));
                Ok(())
            }
        }
    }

    /// Who was to be let in before any other: of its shard, and where tenants are told apart of the
    /// request's tenant and class.
    fn first_of_line(&self, request: RequestId) -> Option<Rank> {
        let flow = |id: &RequestId| {
            let submit = self.clients.get(id).map(|client| &client.submit);
            submit.map(|submit| (submit.priority, submit.tenant))
        };
        let home = |id: &RequestId| self.homes.get(id);
        let mut line = self.unstarted.iter().filter(|(.., id)| home(id) == home(&request));
        line.find(|(.., id)| !self.scenario.named || flow(id) == flow(&request)).copied()
    }

    /// Whether a group is given up over a step that it owes.
    fn justified(&self, reason: WorkerFault) -> Check {
        let WorkerFault::Overdue { seq, .. } = reason else { return Ok(()) };
        match self.ranks.missing() {
            Some((missing, ranks)) if missing == seq && !ranks.is_empty() => Ok(()),
            _ if !self.scenario.joined => Ok(()),
            missing => Err(format!("step {seq} is overdue, but what is missing is {missing:?}")),
        }
    }

    fn hear_token(&mut self, request: RequestId, token: TokenId) -> Check {
        self.figures.tokens += 1;
        let client = self.client(request)?;
        client.token(token).map_err(|what| format!("{request}: {what}"))?;
        let due = client.stop_at.filter(|(at, _)| *at == client.got());
        if let Some((_, keep)) = due {
            let mut rng = Rng::new(chain(self.scenario.seed, request.0));
            let delay = Duration::from_micros(rng.below(20_000));
            self.after(delay, Happening::Stop(request, keep));
            if rng.one_in(8) {
                // More tokens than it can have got: must change nothing.
                self.after(delay / 2, Happening::Stop(request, 5000));
            }
        }
        Ok(())
    }

    fn hear_end(&mut self, request: RequestId, reason: FinishReason, usage: Usage) -> Check {
        let client = self.client(request)?;
        client.finished(reason, usage).map_err(|what| format!("{request}: {what}"))?;
        let Some(client) = self.leave(request) else { return Ok(()) };
        self.story.ended(&client, self.now, usage.output);
        let kind = match reason {
            FinishReason::Stop(_) | FinishReason::Length => 0,
            FinishReason::StopString => 1,
            FinishReason::Aborted => 2,
            FinishReason::Deadline => 3,
            FinishReason::WorkerDied { .. } => 4,
            FinishReason::Fault(_) => 5,
            FinishReason::Refused(
                Refusal::CacheTooSmall { .. }
                | Refusal::Shed { .. }
                | Refusal::DeadlineUnreachable { .. },
            ) => {
                self.figures.refused += 1;
                return Ok(());
            }
            FinishReason::Refused(_) => return Err(format!("{request} ended {reason:?}")),
        };
        self.figures.ends[kind] += 1;
        if kind < 2 {
            self.goes_on(&client, usage.output.as_usize());
        }
        Ok(())
    }

    /// A client is told no more.
    fn leave(&mut self, request: RequestId) -> Option<Client> {
        let client = self.clients.remove(&request)?;
        self.homes.remove(&request);
        self.unstarted.remove(&rank_of(&client));
        if self.ended.len() == ENDED_KEPT {
            self.ended.pop_front();
        }
        self.ended.push_back(client.submit.clone());
        Some(client)
    }

    fn client(&mut self, request: RequestId) -> Check<&mut Client> {
        self.clients.get_mut(&request).ok_or_else(|| format!("{request} had ended"))
    }
}
