//! Which shard gets a request: prefix hit against load, and the report of why.
//!
//! Pure arithmetic over what each shard would have to do before the request's first token, in tokens to
//! compute. It looks nothing up. Invariant: of shards that are alike, each is chosen in turn.

use core::fmt;
use ids::{BLOCK_TOKENS, RequestId, ShardId, Tokens};

/// What a live request counts for, in tokens to compute: nobody knows how long it goes on, so a block.
/// A hit is worth as many requests as it has blocks.
const LIVE: u64 = BLOCK_TOKENS as u64;

/// What a request would find in one shard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Weighed {
    /// Tokens of its prompt in the prefix cache.
    pub hit: Tokens,
    /// Prompt tokens of others that are to be computed first.
    pub ahead: u64,
    /// Requests running or waiting.
    pub live: u32,
    /// Tokens for which there are no free blocks now.
    pub short: u64,
}

impl Weighed {
    /// Tokens to compute before the request's first token, or what takes about as long.
    fn cost(&self, prompt: Tokens) -> u64 {
        let own = u64::from(prompt.saturating_sub(self.hit).0);
        own + self.ahead + LIVE * u64::from(self.live) + self.short
    }
}

/// What decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The most of the prompt is cached there.
    Prefix,
    /// No shard has more of the prompt cached than another; there the least is to be done.
    Load,
    /// More of the prompt is cached elsewhere, where so much is to be done that computing it again is
    /// sooner.
    LoadOverPrefix,
}

/// A request, its shard, and what was weighed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The request.
    pub request: RequestId,
    /// Where it runs.
    pub shard: ShardId,
    /// Tokens of its prompt.
    pub prompt: Tokens,
    /// What decided.
    pub why: Why,
    /// Every shard, in their order.
    pub weighed: Vec<Weighed>,
}

impl Placement {
    /// Chooses the shard where the least stands before the first token; of equals the first from `turn` on.
    #[must_use]
    pub fn choose(request: RequestId, prompt: Tokens, weighed: Vec<Weighed>, turn: usize) -> Self {
        let in_turn = (turn..weighed.len()).chain(0..turn.min(weighed.len()));
        let chosen = in_turn.min_by_key(|at| weighed[*at].cost(prompt)).unwrap_or(0);
        let hit = |at: usize| weighed.get(at).map_or(Tokens::ZERO, |shard| shard.hit);
        let best = weighed.iter().map(|shard| shard.hit).max().unwrap_or_default();
        let why = if weighed.iter().all(|shard| shard.hit == best) {
            Why::Load
        } else if hit(chosen) == best {
            Why::Prefix
        } else {
            Why::LoadOverPrefix
        };
        let shard = ShardId(u16::try_from(chosen).unwrap_or(u16::MAX));
        Self { request, shard, prompt, why, weighed }
    }

    /// Tokens of the prompt that are not cached where it goes.
    #[must_use]
    pub fn uncached(&self) -> u64 {
        let hit = self.weighed.get(self.shard.index()).map_or(Tokens::ZERO, |shard| shard.hit);
        u64::from(self.prompt.saturating_sub(hit).0)
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let why = match self.why {
            Why::Prefix => "the most of its prompt is cached there",
            Why::Load => "the least is to be done there",
            Why::LoadOverPrefix => "where more of its prompt is cached too much is to be done",
        };
        write!(f, "request {} to shard {}: {why}", self.request, self.shard)?;
        for (at, shard) in self.weighed.iter().enumerate() {
            let Weighed { hit, ahead, live, short } = shard;
            let cost = shard.cost(self.prompt);
            write!(f, "; shard {at}: {hit} of {} tokens cached, ", self.prompt)?;
            write!(f, "{ahead} ahead, {live} requests, {short} without blocks, cost {cost}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placed(weighed: &[Weighed], turn: usize) -> (u16, Why) {
        let prompt = Tokens(1000);
        let placement = Placement::choose(RequestId(1), prompt, weighed.to_vec(), turn);
        (placement.shard.0, placement.why)
    }

    #[test]
    fn a_hit_draws_and_load_pushes_away() {
        let idle = Weighed::default();
        let hit = Weighed { hit: Tokens(640), ..idle };
        assert_eq!(placed(&[idle, hit], 0), (1, Why::Prefix));
        // As many requests as the hit has blocks, and one more.
        assert_eq!(placed(&[idle, Weighed { live: 10, ..hit }], 1), (1, Why::Prefix));
        assert_eq!(placed(&[idle, Weighed { live: 11, ..hit }], 1), (0, Why::LoadOverPrefix));
        assert_eq!(placed(&[idle, Weighed { ahead: 641, ..hit }], 1), (0, Why::LoadOverPrefix));
        assert_eq!(placed(&[idle, Weighed { short: 641, ..hit }], 1), (0, Why::LoadOverPrefix));
        // A hit that all share draws nowhere.
        assert_eq!(placed(&[Weighed { live: 1, ..hit }, hit], 0), (1, Why::Load));
    }

    #[test]
    fn equals_are_chosen_in_turn() {
        let idle = [Weighed::default(); 3];
        let chosen: Vec<_> = (0..3).map(|turn| placed(&idle, turn)).collect();
        assert_eq!(chosen, [(0, Why::Load), (1, Why::Load), (2, Why::Load)]);
    }

    #[test]
    fn the_report_names_every_shard_with_its_numbers() {
        let weighed = vec![
            Weighed { live: 2, ..Weighed::default() },
            Weighed { hit: Tokens(64), ahead: 7, ..Weighed::default() },
        ];
        let text = Placement::choose(RequestId(9), Tokens(100), weighed, 0).to_string();
        for part in [
            "request 9 to shard 1: the most of its prompt is cached there",
            "shard 0: 0 of 100 tokens cached, 0 ahead, 2 requests, 0 without blocks, cost 228",
            "shard 1: 64 of 100 tokens cached, 7 ahead, 0 requests, 0 without blocks, cost 43",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }
}
