//! Which shard a request must get: where the least is to be computed before its first token.
//!
//! It lets nobody in. Invariant: hits and load are counted from the models' own lists and blocks.

use super::group::Group;
use super::{Naive, Phase, Req};
use ids::{BLOCK_TOKENS, RequestId, ShardId, Tokens};
use scheduler::{Placement, Submit, Weighed, Why};

impl Group {
    /// Puts a request into a shard, and says why where there are several.
    pub(super) fn place(&mut self, submit: &Submit) -> usize {
        if self.shards.len() == 1 {
            return 0;
        }
        let weighed: Vec<Weighed> = (0..)
            .zip(&self.shards)
            .map(|(at, shard)| {
                let owed = self
                    .owed
                    .iter()
                    .filter(|(request, home, _)| *home == at && shard.never_ran(*request));
                shard.weigh(submit, owed.map(|(.., tokens)| tokens).sum())
            })
            .collect();
        let prompt = submit.prompt.len() as u64;
        let cost = |at: usize| {
            let Weighed { hit, ahead, live, short } = weighed[at];
            prompt - u64::from(hit.0) + ahead + u64::from(live * BLOCK_TOKENS) + short
        };
        let n = weighed.len();
        let in_turn = (0..n).map(|i| (self.turn + i) % n);
        let home = in_turn.min_by_key(|at| cost(*at)).unwrap_or(0);
        let hits: Vec<Tokens> = weighed.iter().map(|shard| shard.hit).collect();
        let best = hits.iter().copied().max().unwrap_or_default();
        let why = match (hits.iter().all(|hit| *hit == best), hits[home] == best) {
            (true, _) => Why::Load,
            (false, true) => Why::Prefix,
            (false, false) => Why::LoadOverPrefix,
        };
        let request = submit.request;
        self.owed.retain(|(id, home, _)| self.shards[*home].never_ran(*id));
        self.owed.push((request, home, prompt - u64::from(hits[home].0)));
        self.turn = (home + 1) % n;
        let (shard, prompt) = (ShardId(home as u16), Tokens(prompt as u32));
        self.placements.push_back(Placement { request, shard, prompt, why, weighed });
        home
    }
}

impl Naive {
    fn never_ran(&self, request: RequestId) -> bool {
        self.phase(request) == Phase::Queued
    }

    /// What a request would find, `owed` tokens of those that never ran being ahead of it.
    fn weigh(&self, submit: &Submit, owed: u64) -> Weighed {
        let waiting = self.waiting().len() as u32;
        let Some(life) = &self.life else {
            return Weighed { hit: Tokens::ZERO, ahead: owed, live: waiting, short: 0 };
        };
        let prompt = submit.prompt.len() as u32;
        let cacheable = self.config.prefix_caching && submit.prompt_logprobs.is_none();
        // A token is left to compute, and what was not hashed is not looked up for this.
        let most = ((prompt - 1) / BLOCK_TOKENS).min(submit.prompt_hashes.len() as u32);
        let most = if cacheable { most } else { 0 };
        let hit = life.cache.hit(submit.root, &submit.prompt, most);
        let prefilling = self.requests.iter().filter(|r| r.phase() == Phase::Prefilling);
        let left = |r: &Req| r.seat().map_or(0, |seat| u64::from(r.known() - seat.planned));
        let lacks = |group: usize| {
            let own = life.cache.most_held(group, prompt).saturating_sub(hit);
            own.saturating_sub(life.cache.mintable(group))
        };
        let short = (0..life.cache.groups()).map(lacks).max().unwrap_or(0);
        Weighed {
            hit: Tokens(hit * BLOCK_TOKENS),
            ahead: owed + prefilling.map(left).sum::<u64>(),
            live: waiting + self.running().len() as u32,
            short: u64::from(short * BLOCK_TOKENS),
        }
    }
}
