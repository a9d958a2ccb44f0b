//! The decode part of a step: who can run one more token, and the delta to the worker's decode set.
//!
//! One pass over the decoding requests, a few words each; block tables are only touched by those
//! that cross a block boundary. Invariant: a slot decodes in exactly the steps in which it is in
//! the worker's decode set, and never past its capacity or its limit.

use crate::life::{Flight, Life};
use crate::plan::Draft;
use crate::policy::cost::Load;
use crate::request::Live;
use crate::scheduler::Scheduler;
use crate::slab::Key;
use ids::Tokens;
use step::DecodeDelta;

impl Scheduler {
    /// Decides who can run; takes blocks for those at a boundary, first in line first.
    pub(crate) fn plan_decodes(&mut self, life: &mut Life, draft: &mut Draft) {
        let mut short = core::mem::take(&mut self.spare.short);
        for key in &life.decoding {
            let Some(Live::Decoding(request)) = self.requests.get_mut(*key) else { continue };
            let (seat, limit) = (&request.state.seat, request.job.limit());
            let goes_on = seat.planned < limit;
            request.state.ready = goes_on && seat.planned < seat.capacity;
            if goes_on && !request.state.ready {
                short.push((request.job.rank, *key));
            }
        }
        short.sort_unstable();
        for (_, key) in short.drain(..) {
            self.extend_decode(life, draft, key);
        }
        self.spare.short = short;
        for key in &life.decoding {
            if let Some(Live::Decoding(request)) = self.requests.get(*key)
                && request.state.ready
            {
                draft.load.decode += 1;
                draft.load.context += u64::from(request.state.seat.planned.0);
            }
        }
    }

    fn extend_decode(&mut self, life: &mut Life, draft: &mut Draft, key: Key) {
        // One that lost its seat to an earlier one in line is not decoding any more.
        let Some(Live::Decoding(request)) = self.requests.get(key) else { return };
        let (id, want) = (request.job.id, request.state.seat.planned + Tokens(1));
        match self.reach(life, draft, key, want) {
            Ok(()) => {
                if let Some(Live::Decoding(request)) = self.requests.get_mut(key) {
                    let seat = &request.state.seat;
                    request.state.ready = seat.planned < seat.capacity;
                }
            }
            Err(waits) => self.stalls.push((id, waits)),
        }
    }

    /// Moves every ready slot one token on and writes the delta of the decode set.
    pub(crate) fn launch_decodes(
        &mut self,
        life: &mut Life,
        flight: &mut Flight,
        delta: &mut DecodeDelta,
    ) -> Load {
        let mut load = Load::default();
        for key in &life.decoding {
            let Some(Live::Decoding(request)) = self.requests.get_mut(*key) else { continue };
            let state = &mut request.state;
            let at = state.seat.slot.at();
            if state.ready {
                state.seat.planned += Tokens(1);
                flight.samplers.push(at);
                load.decode += 1;
                load.context += u64::from(state.seat.planned.0);
                if !state.in_set {
                    delta.join.push(at.slot);
                }
            } else if state.in_set {
                delta.leave.push(at.slot);
            }
            state.in_set = state.ready;
        }
        load
    }
}
