//! Plans that were sent, until their step is answered and what they are made of can be used again.
//!
//! A plan is shared with the sessions of all ranks, each of which lets go of it once it is on the wire:
//! before the rank can answer. It sends nothing. Invariant: a plan is given back only when nobody else
//! reads it; a steady step takes no memory here.

use ids::{StepSeq, Tokens};
use scheduler::MAX_DEPTH;
use std::collections::VecDeque;
use std::sync::Arc;
use step::StepPlan;

/// Plans of one life, oldest first.
#[derive(Debug, Default)]
pub(crate) struct Plans {
    sent: VecDeque<Arc<StepPlan>>,
    /// Shells without content.
    shells: Vec<Arc<StepPlan>>,
}

impl Plans {
    /// The plan as sessions share it.
    pub(crate) fn share(&mut self, plan: StepPlan) -> Arc<StepPlan> {
        let shared = match self.shells.pop() {
            Some(mut shell) => {
                match Arc::get_mut(&mut shell) {
                    Some(inner) => *inner = plan,
                    None => shell = Arc::new(plan),
                }
                shell
            }
            None => Arc::new(plan),
        };
        self.sent.push_back(Arc::clone(&shared));
        shared
    }

    /// The plan of an answered step; nothing where a session still holds it. Those before it were of a
    /// life that is over.
    pub(crate) fn back(&mut self, seq: StepSeq) -> Option<StepPlan> {
        while let Some(mut shared) = self.sent.pop_front() {
            if shared.seq != seq {
                continue;
            }
            let plan = core::mem::replace(Arc::get_mut(&mut shared)?, nothing(seq));
            if self.shells.len() <= MAX_DEPTH as usize {
                self.shells.push(shared);
            }
            return Some(plan);
        }
        None
    }

    /// The life is over: nobody answers any more.
    pub(crate) fn clear(&mut self) {
        self.sent.clear();
    }
}

fn nothing(seq: StepSeq) -> StepPlan {
    StepPlan {
        seq,
        incarnation: ids::Incarnation(0),
        bucket: Tokens::ZERO,
        shard_tokens: Vec::new(),
        sections: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use step::Section;

    fn plan(seq: u64) -> StepPlan {
        let sections = vec![Section::default()];
        StepPlan { sections, shard_tokens: vec![Tokens(1)], ..nothing(StepSeq(seq)) }
    }

    #[test]
    fn a_plan_comes_back_once_nobody_reads_it_and_its_shell_is_used_again() {
        let mut plans = Plans::default();
        let shared = plans.share(plan(1));
        let address = Arc::as_ptr(&shared);
        drop(shared);
        assert_eq!(plans.back(StepSeq(1)), Some(plan(1)));
        assert_eq!(plans.back(StepSeq(1)), None, "once");
        let shared = plans.share(plan(2));
        assert_eq!((Arc::as_ptr(&shared), &*shared), (address, &plan(2)));
        // A session that still encodes it keeps it.
        assert_eq!(plans.back(StepSeq(2)), None);
        assert_eq!(*shared, plan(2));
    }

    #[test]
    fn plans_that_nobody_answered_are_forgotten() {
        let mut plans = Plans::default();
        drop(plans.share(plan(7)));
        drop(plans.share(plan(8)));
        plans.clear();
        drop(plans.share(plan(1)));
        assert_eq!(plans.back(StepSeq(1)), Some(plan(1)));
    }
}
