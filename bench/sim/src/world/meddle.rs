//! Clients and operators who do what they may at the worst moment, and what they may not.
//!
//! Time is drawn, then a phase, then somebody in it, so that rare phases are met as often as
//! common ones. It knows phases from the naive model. Invariant: an act that must change nothing
//! leaves its client's expectations as they were.

use super::{Check, Happening, World};
use crate::act::Act;
use crate::naive::Phase;
use core::time::Duration;
use ids::RequestId;
use scheduler::Event;

impl World {
    pub(super) fn meddle(&mut self, n: u64) -> Check {
        let act = Act::Meddle(n);
        if self.scenario.meddling.is_zero() || !self.expects(act, Act::Meddle(u64::MAX)) {
            return Ok(());
        }
        let mut rng = act.rng(self.scenario.seed);
        let wait = rng.below(2 * self.scenario.meddling.as_nanos() as u64);
        self.after(Duration::from_nanos(wait), Happening::Meddle(n + 1));
        if !self.acts(act) {
            return Ok(());
        }
        let phase = Phase::ALL[rng.below(Phase::ALL.len() as u64) as usize];
        let (kind, pick, keep) = (rng.below(8), rng.draw(), rng.draw());
        let there = self.model.in_phase(phase);
        let request = match phase {
            Phase::Absent => self.gone(pick),
            _ => pick.checked_rem(there.len() as u64).map(|at| there[at as usize]),
        };
        let Some(request) = request else { return Ok(()) };
        match kind {
            0 => self.abort(request),
            1 | 2 => {
                // Up to one token more than there are.
                let got = self.clients.get(&request).map_or(3, |client| client.got());
                self.stop(request, (keep % (u64::from(got) + 2)) as u32)
            }
            // Only the model knows whether the id is still in use.
            3 if self.scenario.compared => self.submit_again(request),
            _ => self.handle(Event::ForcePreempt(request)),
        }
    }

    /// An id that was given and is known no more.
    fn gone(&self, pick: u64) -> Option<RequestId> {
        let gone = self.ended.iter().map(|submit| submit.request);
        let gone: Vec<_> = gone.filter(|id| self.model.phase(*id) == Phase::Absent).collect();
        pick.checked_rem(gone.len() as u64).map(|at| gone[at as usize])
    }

    /// The id of a request that is not over, again: must change nothing.
    fn submit_again(&mut self, request: RequestId) -> Check {
        let live = self.clients.get(&request).map(|client| &client.submit);
        let ended = || self.ended.iter().find(|submit| submit.request == request);
        match live.or_else(ended).cloned() {
            // An id is never used for another request.
            Some(submit) if self.model.phase(request) != Phase::Absent => {
                self.handle(Event::Submit(Box::new(submit)))
            }
            _ => Ok(()),
        }
    }
}
