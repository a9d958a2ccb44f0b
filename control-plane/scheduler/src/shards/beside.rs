//! What shards of one group must know of each other: whether anybody may be admitted, and how long the
//! whole group has to hold back for a request that must run alone.
//!
//! A worker's death is the whole group's, so a request that is suspected of it must be alone in all
//! shards. It decides nothing else. Invariant: while one shard's suspect runs or is next to, no other
//! shard admits anybody.

use super::Weighed;
use crate::event::Submit;
use crate::plan::has_room_ahead;
use crate::report::Waits;
use crate::request::Live;
use crate::scheduler::{Scheduler, count};
use crate::tables::{group_id, peak};
use ids::{Blocks, Tokens};
use step::Section;

/// The other shards of a group, as one of them sees them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Beside {
    /// A request runs in another shard.
    pub(crate) running: bool,
    /// A request of another shard runs alone, or is about to.
    pub(crate) barred: bool,
}

/// What all shards are at, while a step is planned shard by shard.
#[derive(Clone, Copy, Debug)]
pub(super) struct Group {
    /// The shard whose request runs alone, or is about to.
    alone: Option<usize>,
    /// Requests that run, in all shards.
    seated: usize,
    /// Of those, in the shard that is planned now.
    before: usize,
}

impl Group {
    pub(super) fn of(shards: &[Scheduler]) -> Self {
        let alone = shards.iter().position(Scheduler::runs_alone);
        let alone = alone.or_else(|| shards.iter().position(Scheduler::waits_alone));
        Self { alone, seated: shards.iter().map(Scheduler::seated).sum(), before: 0 }
    }

    /// Tells a shard what the others are at, those that were planned before it in this step included.
    pub(super) fn arrange(&mut self, at: usize, shard: &mut Scheduler) {
        self.before = shard.seated();
        let running = self.seated > self.before;
        let barred = self.alone.is_some_and(|alone| alone != at);
        shard.beside = Beside { running, barred };
    }

    /// Takes in what the shard did.
    pub(super) fn planned(&mut self, at: usize, shard: &Scheduler) {
        self.seated = self.seated + shard.seated() - self.before;
        if shard.runs_alone() {
            self.alone = Some(at);
        }
    }
}

impl Scheduler {
    /// Whether a step may be planned behind those in flight.
    pub(super) fn may_plan(&self) -> bool {
        self.life.as_ref().is_none_or(|life| has_room_ahead(life, self.config.depth))
    }

    fn seated(&self) -> usize {
        self.life.as_ref().map_or(0, |life| life.running.len())
    }

    fn runs_alone(&self) -> bool {
        self.life.as_ref().is_some_and(|life| life.isolated)
    }

    /// Whether the first in line must run alone and waits for that.
    fn waits_alone(&self) -> bool {
        let Some((request, Waits::Isolation)) = self.head else { return false };
        let live = self.ids.get(&request).and_then(|key| self.requests.get(*key));
        live.is_some_and(|live| live.job().suspect())
    }

    /// The shard's part of a step in which it runs nothing: slots that decode in a worker would run with
    /// the others' step, so they leave, and come back with the next step of their own.
    pub(super) fn stand_still(&mut self) -> Section {
        let Some(life) = &mut self.life else { return Section::default() };
        let mut section = self.spare.section();
        core::mem::swap(&mut section.ops, &mut life.ops);
        for key in &life.decoding {
            if let Some(Live::Decoding(request)) = self.requests.get_mut(*key)
                && core::mem::take(&mut request.state.in_set)
            {
                section.decode.leave.push(request.state.seat.slot.at().slot);
            }
        }
        section
    }

    /// What a request would find here.
    pub(super) fn weigh(&self, submit: &Submit) -> Weighed {
        let owed = self.line.owed();
        let (waiting, ..) = self.line.len();
        let waiting = count(waiting);
        let Some(life) = &self.life else {
            return Weighed { hit: Tokens::ZERO, ahead: owed, live: waiting, short: 0 };
        };
        let prompt = Tokens(count(submit.prompt.len()));
        let hit = if self.config.prefix_caching && submit.prompt_logprobs.is_none() {
            let most = Tokens(prompt.0.saturating_sub(1)).blocks_full().as_usize();
            let hashes = &submit.prompt_hashes[..most.min(submit.prompt_hashes.len())];
            life.cache.lookup(hashes).boundary
        } else {
            Blocks::ZERO
        };
        let left = life.prefilling.values().filter_map(|key| {
            let live = self.requests.get(*key)?;
            let planned = match live {
                Live::Prefilling(request) => request.state.seat.planned,
                Live::Queued(_) | Live::Preempted(_) | Live::Decoding(_) | Live::Closing(_) => {
                    return None;
                }
            };
            Some(u64::from(live.job().known().saturating_sub(planned).0))
        });
        let missing = peak(&life.cache, prompt).into_iter().enumerate().map(|(i, need)| {
            let own = need.saturating_sub(hit);
            own.saturating_sub(life.cache.mintable(group_id(i)))
        });
        let short = missing.max().unwrap_or(Blocks::ZERO);
        Weighed {
            hit: hit.tokens(),
            ahead: owed + left.sum::<u64>(),
            live: waiting + count(life.running.len()),
            short: u64::from(short.tokens().0),
        }
    }
}
