//! A step between its plan and its outcome, and how many of them there may be.
//!
//! It holds what the outcome needs, so that later plans may change the slots meanwhile. It is reused,
//! so that no step allocates for it. Invariant: whom a row belongs to is what it was when the step was
//! enqueued.

use crate::batch::{Batch, Purpose, Wanted};
use crate::digest::Digest;
use crate::executor::{ExecutorError, RowDraw};
use crate::sampler::Sampler;
use crate::slots::Slots;
use crate::{PlanError, StepError};
use ids::{Incarnation, SlotGeneration, StepSeq};
use std::time::Instant;
use step::StepPlan;

/// Steps enqueued at once: one runs, and the next waits behind it on the device.
pub(crate) const MOST_FLIGHTS: usize = 2;

/// One step that was enqueued.
#[derive(Debug)]
pub(crate) struct Flight {
    pub(crate) seq: StepSeq,
    pub(crate) incarnation: Incarnation,
    pub(crate) digest: Digest,
    pub(crate) batch: Batch,
    /// How each wanted row is drawn on a device; `None` where the host has to.
    pub(crate) draws: Vec<Option<RowDraw>>,
    /// Life of the slot of each wanted row.
    pub(crate) lives: Vec<SlotGeneration>,
    /// Whether the executor draws all tokens and keeps them for the next step. Otherwise no other
    /// step can be enqueued before this one's tokens are known.
    pub(crate) ahead: bool,
    /// Whether the model runs: for tokens of this shard, or beside another shard's.
    pub(crate) runs: bool,
    /// When its plan was taken.
    pub(crate) began: Instant,
}

impl Flight {
    pub(crate) fn with_capacity(tokens: usize, slots: usize) -> Self {
        Self {
            seq: StepSeq::ZERO,
            incarnation: Incarnation(0),
            digest: Digest::none(),
            batch: Batch::with_capacity(tokens, slots),
            draws: Vec::with_capacity(slots),
            lives: Vec::with_capacity(slots),
            ahead: false,
            runs: false,
            began: Instant::now(),
        }
    }

    /// Takes a plan's name and digest.
    pub(crate) fn begin(&mut self, plan: &StepPlan) {
        self.began = Instant::now();
        (self.seq, self.incarnation) = (plan.seq, plan.incarnation);
        self.digest = Digest::of_plan(plan);
    }

    /// Notes whose the wanted rows are and how they are drawn.
    pub(crate) fn fill_draws(&mut self, slots: &mut Slots) -> Result<(), PlanError> {
        self.draws.clear();
        self.lives.clear();
        for Wanted { slot, purpose, .. } in &self.batch.wanted {
            let generation = slots.row(*slot).generation;
            let life = slots.life_mut(*slot)?;
            self.draws.push(match purpose {
                Purpose::Sample => Sampler::on_device(life, *slot),
                Purpose::Prompt { position } => Sampler::described(life, *position),
            });
            self.lives.push(generation.unwrap_or_default());
        }
        Ok(())
    }

    /// A failure of the device, or between ranks, in this step.
    pub(crate) fn failed(
        &self,
        during: &'static str,
        source: impl Into<ExecutorError>,
    ) -> StepError {
        let (rows, requests) = (self.batch.ids.len(), self.batch.runs.len());
        match source.into() {
            ExecutorError::Cuda(source) => {
                StepError::Device { during, step: self.seq, rows, requests, source }
            }
            ExecutorError::Collective(source) => StepError::Collective { step: self.seq, source },
        }
    }
}
