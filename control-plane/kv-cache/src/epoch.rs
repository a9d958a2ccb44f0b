//! The clock of launched and retired steps, and the only place where [`Retired`] is made.
//!
//! Knows nothing of blocks. Invariant: steps retire in launch order, each once, and a proof never
//! covers a step that has not retired.

use ids::StepSeq;

/// Proof that every step up to some sequence number has retired, so that nothing launched up to
/// then reads or writes any more.
#[must_use = "limbo is reclaimed with it"]
#[derive(Debug)]
pub struct Retired {
    through: StepSeq,
}

impl Retired {
    /// Whether what was released while `stamp` was the newest launched step may be reused.
    #[must_use]
    pub fn covers(&self, stamp: StepSeq) -> bool {
        stamp <= self.through
    }
}

/// An outcome that is not the next one due.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EpochError {
    /// The step has retired before.
    #[error("step {seq} retired already, the newest retired is {retired}")]
    Repeated {
        /// The step named.
        seq: StepSeq,
        /// The newest retired.
        retired: StepSeq,
    },
    /// An earlier step has not retired yet.
    #[error("step {seq} cannot retire before step {due}")]
    Early {
        /// The step named.
        seq: StepSeq,
        /// The one that must retire first.
        due: StepSeq,
    },
    /// The step was never launched.
    #[error("step {seq} was not launched, the newest launched is {launched}")]
    NotLaunched {
        /// The step named.
        seq: StepSeq,
        /// The newest launched.
        launched: StepSeq,
    },
}

/// Launched and retired steps of one incarnation.
#[derive(Debug, Default)]
pub(crate) struct Epochs {
    launched: StepSeq,
    retired: StepSeq,
}

impl Epochs {
    pub(crate) fn launched(&self) -> StepSeq {
        self.launched
    }

    pub(crate) fn launch(&mut self) -> StepSeq {
        self.launched = self.launched.next();
        self.launched
    }

    /// What is proven now.
    pub(crate) fn proof(&self) -> Retired {
        Retired { through: self.retired }
    }

    pub(crate) fn may_retire(&self, seq: StepSeq) -> Result<(), EpochError> {
        if seq > self.launched {
            return Err(EpochError::NotLaunched { seq, launched: self.launched });
        }
        if seq <= self.retired {
            return Err(EpochError::Repeated { seq, retired: self.retired });
        }
        let due = self.retired.next();
        if seq != due {
            return Err(EpochError::Early { seq, due });
        }
        Ok(())
    }

    pub(crate) fn retire(&mut self, seq: StepSeq) -> Result<Retired, EpochError> {
        self.may_retire(seq)?;
        self.retired = seq;
        Ok(self.proof())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_retire_in_order_and_once() {
        let mut epochs = Epochs::default();
        let (one, two) = (epochs.launch(), epochs.launch());
        assert_eq!(epochs.retire(two).err(), Some(EpochError::Early { seq: two, due: one }));
        let proof = epochs.retire(one).expect("due");
        assert!(proof.covers(one) && !proof.covers(two));
        assert!(matches!(epochs.retire(one), Err(EpochError::Repeated { .. })));
        assert!(epochs.retire(two).is_ok());
        assert!(matches!(epochs.retire(two.next()), Err(EpochError::NotLaunched { .. })));
    }
}
