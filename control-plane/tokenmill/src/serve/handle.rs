//! The engine as the gateway sees it: a handle to the driver's thread.
//!
//! Prompts are hashed here, on the gateway's threads. Invariant: nothing here waits for the driver.

use super::driver::{Inbox, Message};
use super::life::Progress;
use super::story;
use gateway::engine::{
    self, GenerateRequest, Generation, GenerationControl, Limits, NoStory, Readiness, SubmitError,
};
use ids::{HashKey, RequestId, TenantId, Timestamp, Tokens};
use scheduler::Submit;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::unbounded_channel;
use tokio::sync::oneshot;

/// When a client refused before the scheduler saw it should come again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// How many may read the journal at once: each keeps what is written over meanwhile.
pub(super) const READERS: usize = 2;

/// A handle to the running engine.
pub(crate) struct Handle {
    pub(crate) inbox: Inbox,
    pub(crate) progress: Arc<Progress>,
    pub(crate) hash_key: HashKey,
    pub(crate) limits: Limits,
    pub(crate) max_queued: (u32, u64),
    pub(crate) origin: Instant,
    pub(crate) next: AtomicU64,
    /// Bounds who reads the journal; absent where none is kept.
    pub(crate) readers: Option<Arc<Semaphore>>,
}

impl Handle {
    /// A tenant's number. Keyed, so that nobody can choose a name to share another's.
    fn tenant(&self, name: &str) -> TenantId {
        TenantId(self.hash_key.root(name.as_bytes()).0 as u64)
    }
}

impl engine::Engine for Handle {
    fn submit(&self, request: GenerateRequest) -> Result<Generation, SubmitError> {
        match self.progress.readiness() {
            // A stall may end.
            Readiness::Ready | Readiness::Stalled => {}
            Readiness::Restarting { .. } if self.progress.is_worth_waiting_for() => {}
            not_ready => return Err(SubmitError::NotReady(not_ready)),
        }
        // Whom a full queue turns away is the scheduler's choice; here only those are bounded of whom
        // it does not know yet.
        if !self.progress.knocks(self.max_queued.0, request.prompt.len() as u64, self.max_queued.1)
        {
            return Err(SubmitError::QueueFull { retry_after: RETRY_AFTER });
        }
        let id = RequestId(self.next.fetch_add(1, Ordering::Relaxed));
        let arrival = Timestamp::ZERO.after(self.origin.elapsed());
        let root = self.hash_key.root(request.cache_salt.as_deref().unwrap_or("").as_bytes());
        let submit = Submit {
            request: id,
            prompt_hashes: self.hash_key.chain_all(root, &request.prompt).into(),
            prompt: request.prompt,
            root,
            sampling: request.sampling,
            max_tokens: request.max_tokens,
            // The gateway puts the model's end tokens among the stop tokens, or leaves them out.
            end_tokens: Arc::default(),
            ignore_eos: false,
            stop_tokens: request.stop_token_ids,
            prompt_logprobs: request.prompt_logprobs,
            priority: request.priority,
            tenant: request.tenant.map_or(TenantId(0), |name| self.tenant(&name)),
            deadline: request.deadline.map(|wait| arrival.after(wait)),
            arrival,
        };
        let (events_in, events) = unbounded_channel();
        self.inbox.send(Message::Submit(Box::new(submit), events_in));
        let control = Control { inbox: self.inbox.clone(), request: id };
        Ok(Generation::new(events, Box::new(control)).numbered(id))
    }

    fn readiness(&self) -> Readiness {
        self.progress.readiness()
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn explain(
        &self,
        generations: &[RequestId],
        since: Instant,
        until: Option<Instant>,
    ) -> engine::Stories {
        let generations = generations.to_vec();
        let Some(readers) = self.readers.clone() else {
            let untold = vec![Err(NoStory::NoJournal); generations.len()];
            return Box::pin(std::future::ready(untold));
        };
        let at = |time: Instant| Timestamp::ZERO.after(time.duration_since(self.origin));
        let (zero, until, inbox) = (at(since), until.map(at), self.inbox.clone());
        Box::pin(async move {
            let untold = |why: &str| vec![Err(NoStory::NotTold(why.to_owned())); generations.len()];
            let Ok(_reader) = readers.acquire().await else { return untold("shutting down") };
            let (ask, pages) = oneshot::channel();
            inbox.send(Message::Read(ask));
            let Ok(pages) = pages.await else { return untold("the scheduler is gone") };
            // A full journal takes milliseconds to go through.
            let asked = generations.clone();
            let read = tokio::task::spawn_blocking(move || {
                let told = |number: &RequestId| match pages.history(*number) {
                    Ok(history) => Ok(story::spell(&history, zero, until)),
                    Err(error) => Err(NoStory::NotTold(error.to_string())),
                };
                asked.iter().map(told).collect()
            });
            read.await.unwrap_or_else(|_| untold("the journal could not be read"))
        })
    }
}

struct Control {
    inbox: Inbox,
    request: RequestId,
}

impl GenerationControl for Control {
    fn stop(&self, keep: Tokens) {
        self.inbox.send(Message::Stop(self.request, keep));
    }

    fn abort(&self) {
        self.inbox.send(Message::Abort(self.request));
    }
}
