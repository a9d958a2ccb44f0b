//! One session: load, hello, configure, then steps until either side ends.
//!
//! An outcome is sealed here with the digest of every command that came until its plan, so that it says
//! what this rank was told as well as what it drew; a rank that does not lead its shard says only that.

use crate::planted::{self, Planted};
use ids::{Incarnation, RequestId};
use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::Duration;
use step::{
    Configure, Digest, Hello, LoadProgress, Outcome, Seat, StartPhase, StepPlan, ToScheduler,
    ToWorker, Upload,
};
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::mpsc::error::TryRecvError;
use wire::{Incoming, Malformed, ServeError};

/// What executes steps. One lives on the engine thread of a worker.
pub trait Stepper: 'static {
    /// What this engine offers; said once, after loading.
    fn hello(&self) -> Hello;
    /// Carves memory and sets limits; called once, before any step.
    ///
    /// # Errors
    /// When the configuration does not fit what `hello` offered.
    fn configure(&mut self, configure: &Configure) -> Result<(), WorkerFault>;
    /// Parts of the start that ended since the last call; asked for after loading and configuring.
    fn take_phases(&mut self) -> Vec<(StartPhase, Duration)> {
        Vec::new()
    }
    /// Takes tokens ahead of an admission.
    ///
    /// # Errors
    /// When they do not continue what was uploaded.
    fn upload(&mut self, upload: &Upload) -> Result<(), WorkerFault>;
    /// Drops tokens that will not be admitted.
    fn forget(&mut self, request: RequestId);
    /// Steps enqueued and not collected.
    fn in_flight(&self) -> usize;
    /// Whether another step may be enqueued before the oldest is collected.
    fn accepts(&self) -> bool;
    /// Applies a plan and starts its step, behind those that run.
    ///
    /// # Errors
    /// When the plan contradicts the engine's state; the engine cannot be trusted afterwards.
    fn enqueue(&mut self, plan: &StepPlan) -> Result<(), WorkerFault>;
    /// Whether [`Stepper::collect`] would not wait for a step; false where there is none.
    ///
    /// # Errors
    /// When what runs has failed.
    fn ready(&self) -> Result<bool, WorkerFault>;
    /// Waits for the oldest step; `None` where there is none.
    ///
    /// # Errors
    /// When it failed; the engine cannot be trusted afterwards.
    fn collect(&mut self) -> Result<Option<Outcome>, WorkerFault>;
}

/// Why a worker gives up. The text is for the operator: what is wrong and what to do.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct WorkerFault(pub String);

impl WorkerFault {
    /// A fault with the whole chain of `error` in its text.
    pub fn from_error(error: &dyn std::error::Error) -> Self {
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            source = cause.source();
        }
        Self(text)
    }
}

/// Which rank a session is of, and what is to go wrong in it.
#[derive(Clone, Copy, Debug)]
pub struct Role {
    /// The rank.
    pub seat: Seat,
    /// A fault for tests.
    pub planted: Option<Planted>,
}

/// Serves `socket` for one session. `load` runs on the engine thread and reports its progress.
///
/// # Errors
/// When the socket cannot be served; a fault of the engine is told to the scheduler instead.
pub async fn serve<S, L>(socket: &Path, role: Role, load: L) -> Result<(), ServeError>
where
    S: Stepper,
    L: FnOnce(&mut (dyn FnMut(LoadProgress) + Send)) -> Result<S, WorkerFault> + Send + 'static,
{
    wire::serve(socket, move |mut incoming| {
        if let Some(planted) = role.planted {
            incoming.replies = planted::slowed(planted, incoming.replies);
        }
        let replies = incoming.replies.clone();
        let engine = std::thread::Builder::new().name("engine".into());
        if let Err(error) = engine.spawn(move || live(incoming, role, load)) {
            let _ = replies.send(ToScheduler::Fault(format!("cannot start a thread: {error}")));
        }
    })
    .await
}

/// The engine thread: everything that goes wrong becomes the last reply.
fn live<S: Stepper>(
    mut incoming: Incoming,
    role: Role,
    load: impl FnOnce(&mut (dyn FnMut(LoadProgress) + Send)) -> Result<S, WorkerFault>,
) {
    let replies = incoming.replies.clone();
    // A panic is a bug in the engine; it must reach the operator through the scheduler's log and
    // end this life, not leave a thread dead and a stream open.
    let lived = catch_unwind(AssertUnwindSafe(|| run(&mut incoming, role, load)));
    let fault = match lived {
        Ok(Ok(())) => return,
        Ok(Err(fault)) => fault.0,
        Err(panic) => format!("the engine panicked: {}", panic_text(panic.as_ref())),
    };
    tracing::error!(fault, "worker fault");
    let _ = replies.send(ToScheduler::Fault(fault));
}

/// What a panic said.
#[must_use]
pub fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message")
}

/// What this rank was told, and what its outcomes say of it.
struct Ledger {
    role: Role,
    told: Digest,
    /// At each plan without an outcome, oldest first.
    due: VecDeque<Digest>,
}

impl Ledger {
    fn hear(&mut self, command: &ToWorker) {
        if let (Some(planted), ToWorker::Step(plan)) = (self.role.planted, command) {
            planted.before(plan.seq);
        }
        self.told.take(command);
        if let ToWorker::Step(_) = command {
            self.due.push_back(self.told);
        }
    }

    /// Makes the engine's outcome what the scheduler hears.
    fn seal(&mut self, mut outcome: Outcome) -> Outcome {
        let told = self.due.pop_front().unwrap_or_default();
        if let Some(planted) = self.role.planted {
            planted.corrupt_token(&mut outcome);
        }
        outcome.digest = told.with_sampled(&outcome.sampled);
        if let Some(planted) = self.role.planted {
            planted.corrupt_digest(&mut outcome);
        }
        if !self.role.seat.is_lead() {
            outcome.sampled.clear();
            outcome.prompt_logprobs.clear();
        }
        outcome
    }
}

fn run<S: Stepper>(
    incoming: &mut Incoming,
    role: Role,
    load: impl FnOnce(&mut (dyn FnMut(LoadProgress) + Send)) -> Result<S, WorkerFault>,
) -> Result<(), WorkerFault> {
    let replies = incoming.replies.clone();
    let mut engine = load(&mut |progress| say(&replies, ToScheduler::Loading(progress)))?;
    let tell = |engine: &mut S| {
        for (phase, took) in engine.take_phases() {
            say(&replies, ToScheduler::Started(phase, took));
        }
    };
    tell(&mut engine);
    say(&replies, ToScheduler::Hello(engine.hello()));
    let mut life: Option<Incarnation> = None;
    let mut ledger = Ledger { role, told: Digest::none(), due: VecDeque::new() };
    while let Some(command) = next(&mut engine, incoming, &mut ledger, &replies)? {
        let command = command.map_err(|malformed| WorkerFault::from_error(&malformed))?;
        ledger.hear(&command);
        match command {
            ToWorker::Configure(configure) => {
                if life.is_some() {
                    return Err(WorkerFault("configured twice".into()));
                }
                engine.configure(&configure)?;
                tell(&mut engine);
                life = Some(configure.incarnation);
                say(&replies, ToScheduler::Ready(configure.incarnation));
            }
            ToWorker::Upload(upload) => {
                expect_life(life, upload.incarnation)?;
                engine.upload(&upload)?;
            }
            ToWorker::Forget(incarnation, request) => {
                expect_life(life, incarnation)?;
                engine.forget(request);
            }
            ToWorker::Step(plan) => {
                expect_life(life, plan.incarnation)?;
                engine.enqueue(&plan)?;
            }
        }
    }
    Ok(())
}

/// The next command, which may be a plan: so not before the engine accepts one. Meanwhile steps that
/// are over are answered. While a device works this asks again and again, which is what waiting for
/// it would do too: a plan must not wait for the end of a step, nor an end for a plan.
fn next<S: Stepper>(
    engine: &mut S,
    incoming: &mut Incoming,
    ledger: &mut Ledger,
    replies: &UnboundedSender<ToScheduler>,
) -> Result<Option<Result<ToWorker, Malformed>>, WorkerFault> {
    let mut in_flight = true;
    while in_flight {
        if engine.accepts() {
            match incoming.commands.try_recv() {
                Ok(command) => return Ok(Some(command)),
                Err(TryRecvError::Disconnected) => return Ok(None),
                Err(TryRecvError::Empty) => {}
            }
            if !engine.ready()? {
                in_flight = engine.in_flight() > 0;
                std::thread::yield_now();
                continue;
            }
        }
        match engine.collect()? {
            Some(outcome) => say(replies, ToScheduler::Outcome(ledger.seal(outcome))),
            None => in_flight = false,
        }
    }
    Ok(incoming.commands.blocking_recv())
}

fn expect_life(life: Option<Incarnation>, named: Incarnation) -> Result<(), WorkerFault> {
    match life {
        Some(life) if life == named => Ok(()),
        Some(life) => Err(WorkerFault(format!(
            "a command names incarnation {named}, this worker lives in {life}"
        ))),
        None => Err(WorkerFault("a command came before the configuration".into())),
    }
}

fn say(replies: &UnboundedSender<ToScheduler>, reply: ToScheduler) {
    // A scheduler that is gone also ends the commands, which ends the loop.
    let _ = replies.send(reply);
}
