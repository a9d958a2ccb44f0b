//! Faults that tests ask a worker for: one rank that says what is not so, or that does not speak or listen
//! for a while.
//!
//! Deaths and stops need no help from the process and are not here. Invariant: without a planted fault
//! nothing of this runs.

use ids::{StepSeq, TokenId};
use std::time::Duration;
use step::{Outcome, ToScheduler};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

/// A fault and the step that it begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planted {
    /// The step.
    pub step: StepSeq,
    /// What goes wrong.
    pub fault: PlantedFault,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlantedFault {
    /// The digest of the step's outcome is of something else.
    Digest,
    /// From the step on, the first sampled token of each outcome is another one.
    Token,
    /// Nothing is said for so long, once the step is over; commands are still carried out.
    Mute(Duration),
    /// No command is taken for so long, before the step.
    Deaf(Duration),
}

impl Planted {
    /// What happens before a step is taken.
    pub(crate) fn before(self, seq: StepSeq) {
        if let PlantedFault::Deaf(pause) = self.fault
            && self.step == seq
        {
            std::thread::sleep(pause);
        }
    }

    pub(crate) fn corrupt_token(self, outcome: &mut Outcome) {
        if self.fault == PlantedFault::Token
            && outcome.seq >= self.step
            && let Some(sampled) = outcome.sampled.first_mut()
        {
            sampled.token = TokenId(sampled.token.0 ^ 1);
        }
    }

    pub(crate) fn corrupt_digest(self, outcome: &mut Outcome) {
        if self.fault == PlantedFault::Digest && outcome.seq == self.step {
            outcome.digest ^= 1;
        }
    }
}

/// Replies that a mute worker's last as long on their way as it is mute.
pub(crate) fn slowed(
    planted: Planted,
    replies: UnboundedSender<ToScheduler>,
) -> UnboundedSender<ToScheduler> {
    let PlantedFault::Mute(pause) = planted.fault else { return replies };
    let (slow, mut said) = unbounded_channel();
    std::thread::spawn(move || {
        while let Some(reply) = said.blocking_recv() {
            if matches!(&reply, ToScheduler::Outcome(outcome) if outcome.seq == planted.step) {
                std::thread::sleep(pause);
            }
            if replies.send(reply).is_err() {
                return;
            }
        }
    });
    slow
}
