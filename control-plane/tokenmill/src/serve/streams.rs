//! Where each request's results go.
//!
//! It holds channels, no request state. Invariant: a channel is dropped with the request's last event.

use gateway::engine::{
    FinishReason, GeneratedToken, GenerationError, GenerationEvent, SubmitError,
};
use ids::{RequestId, Timestamp};
use scheduler::{FinishReason as Reason, Output, Refusal};
use std::collections::BTreeMap;
use step::SampleFault;
use tokio::sync::mpsc::UnboundedSender;

/// The open streams.
#[derive(Default)]
pub(crate) struct Streams {
    open: BTreeMap<RequestId, Stream>,
}

/// One request's.
struct Stream {
    arrival: Timestamp,
    events: UnboundedSender<GenerationEvent>,
}

impl Streams {
    pub(crate) fn open(
        &mut self,
        request: RequestId,
        arrival: Timestamp,
        events: UnboundedSender<GenerationEvent>,
    ) {
        self.open.insert(request, Stream { arrival, events });
    }

    /// When a request came in, while it lives.
    pub(crate) fn arrival(&self, request: RequestId) -> Option<Timestamp> {
        self.open.get(&request).map(|stream| stream.arrival)
    }

    /// Passes on what concerns a request; commands to the worker are the driver's.
    pub(crate) fn say(&mut self, output: Output) {
        match output {
            Output::Started { request, cached } => {
                self.send(request, GenerationEvent::Started { cached });
            }
            Output::Token { request, token, logprobs } => {
                let token = GeneratedToken { token, logprobs };
                self.send(request, GenerationEvent::Tokens(vec![token]));
            }
            Output::PromptLogprobs(part) => {
                self.send(part.request, GenerationEvent::PromptLogprobs(part));
            }
            Output::Finished { request, reason, .. } => {
                self.end(request, last_event(reason));
            }
            Output::Refused { request, reason } => {
                self.end(request, GenerationEvent::Failed(refused(reason)));
            }
            Output::Upload(_) | Output::Forget(..) | Output::RestartWorker { .. } => {}
        }
    }

    fn send(&self, request: RequestId, event: GenerationEvent) {
        if let Some(stream) = self.open.get(&request) {
            // A client that is gone has closed its end; that is its right.
            let _ = stream.events.send(event);
        }
    }

    fn end(&mut self, request: RequestId, last: GenerationEvent) {
        self.send(request, last);
        self.open.remove(&request);
    }
}

/// What the client is told of a refusal that came after the gateway's own check.
fn refused(refusal: Refusal) -> GenerationError {
    GenerationError::Refused(match refusal {
        Refusal::EmptyPrompt => SubmitError::EmptyPrompt,
        Refusal::TooLong { prompt, max_tokens, max_context } => {
            SubmitError::TooLong { prompt, max_tokens, max_context }
        }
        Refusal::CacheTooSmall { tokens, need, have } => {
            SubmitError::TooLarge { tokens, need, have }
        }
        Refusal::QueueFull { wait, .. } | Refusal::QueueTokens { wait, .. } => {
            SubmitError::QueueFull { retry_after: wait }
        }
        Refusal::Shed { wait } => SubmitError::Shed { retry_after: wait },
        Refusal::DeadlineUnreachable { needs, left, wait } => {
            SubmitError::DeadlineUnreachable { needs, left, retry_after: wait }
        }
        Refusal::DeadlinePassed => return GenerationError::DeadlineExceeded,
    })
}

fn last_event(reason: Reason) -> GenerationEvent {
    let error = match reason {
        Reason::Stop(_) | Reason::StopString => {
            return GenerationEvent::Finished(FinishReason::Stop);
        }
        Reason::Length => return GenerationEvent::Finished(FinishReason::Length),
        Reason::Aborted => GenerationError::Internal("the request was aborted".into()),
        Reason::Deadline => GenerationError::DeadlineExceeded,
        Reason::Fault(SampleFault::NotANumber) => GenerationError::NotANumber,
        Reason::Fault(SampleFault::NothingAllowed) => GenerationError::NothingAllowed,
        Reason::Refused(refusal) => refused(refusal),
        Reason::WorkerDied { .. } => GenerationError::WorkerLost,
    };
    GenerationEvent::Failed(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use gateway::ApiError;
    use ids::Tokens;
    use std::time::Duration;
    use tokio::sync::mpsc::unbounded_channel;

    /// The last event of a request that ended so.
    fn ends(output: impl Fn(RequestId) -> Output) -> GenerationEvent {
        let (sender, mut events) = unbounded_channel();
        let mut streams = Streams::default();
        let request = RequestId(1);
        streams.open(request, Timestamp::ZERO, sender);
        streams.say(output(request));
        assert_eq!(streams.arrival(request), None, "the channel is gone with its last event");
        events.try_recv().expect("an event")
    }

    #[test]
    fn every_refusal_of_the_scheduler_has_a_status_of_its_own() {
        let (tokens, waiting, limit) = (Tokens(9), 3, 3);
        let wait = Duration::from_secs(7);
        let (needs, left) = (wait, wait / 2);
        let cases = [
            (Refusal::EmptyPrompt, 400, "invalid_value", false),
            (
                Refusal::TooLong { prompt: tokens, max_tokens: tokens, max_context: tokens },
                400,
                "context_length_exceeded",
                false,
            ),
            (Refusal::CacheTooSmall { tokens, need: 2, have: 1 }, 400, "kv_cache_too_small", false),
            (Refusal::QueueFull { waiting, limit, wait }, 503, "queue_full", true),
            (
                Refusal::QueueTokens { waiting: 3, prompt: tokens, limit: 3, wait },
                503,
                "queue_full",
                true,
            ),
            (Refusal::Shed { wait }, 503, "shed", true),
            (Refusal::DeadlineUnreachable { needs, left, wait }, 503, "deadline_unreachable", true),
            (Refusal::DeadlinePassed, 504, "deadline_exceeded", false),
        ];
        for (reason, status, code, comes_back) in cases {
            let before = ends(|request| Output::Refused { request, reason });
            let later = ends(|request| Output::Finished {
                request,
                reason: Reason::Refused(reason),
                usage: scheduler::Usage::default(),
            });
            for event in [before, later] {
                let GenerationEvent::Failed(error) = event else { panic!("{event:?}") };
                let error = ApiError::from(error);
                let got = (error.status.as_u16(), error.code, error.retry_after.is_some());
                assert_eq!(got, (status, Some(code), comes_back), "{reason:?}: {error}");
                assert_eq!(error.retry_after, reason.retry_after(), "when, too");
            }
        }
    }
}
