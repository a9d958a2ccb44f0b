//! Where each request's results go.
//!
//! It holds channels, no request state. Invariant: a channel is dropped with the request's last event.

use gateway::engine::{FinishReason, GeneratedToken, GenerationError, GenerationEvent};
use ids::RequestId;
use scheduler::{FinishReason as Reason, Output};
use std::collections::BTreeMap;
use step::SampleFault;
use tokio::sync::mpsc::UnboundedSender;

/// The open streams.
#[derive(Default)]
pub(crate) struct Streams {
    open: BTreeMap<RequestId, UnboundedSender<GenerationEvent>>,
}

impl Streams {
    pub(crate) fn open(&mut self, request: RequestId, events: UnboundedSender<GenerationEvent>) {
        self.open.insert(request, events);
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
                if let Some(events) = self.open.remove(&request) {
                    // A client that is gone has closed its end; that is its right.
                    let _ = events.send(last_event(reason));
                }
            }
            Output::Refused { request, reason } => {
                if let Some(events) = self.open.remove(&request) {
                    let error = GenerationError::Internal(reason.to_string());
                    let _ = events.send(GenerationEvent::Failed(error));
                }
            }
            Output::Upload(_) | Output::Forget(..) | Output::RestartWorker { .. } => {}
        }
    }

    fn send(&self, request: RequestId, event: GenerationEvent) {
        if let Some(events) = self.open.get(&request) {
            let _ = events.send(event);
        }
    }
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
        Reason::Refused(refusal) => GenerationError::Internal(refusal.to_string()),
        Reason::WorkerDied { .. } => GenerationError::WorkerLost,
    };
    GenerationEvent::Failed(error)
}
