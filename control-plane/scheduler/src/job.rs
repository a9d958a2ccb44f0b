//! What a request is, whatever state it is in: its tokens, limits and place in line.
//!
//! Holds no slot and no block; those belong to states. Invariant: `output` only holds confirmed
//! tokens that were streamed, in order.

use crate::event::Submit;
use crate::output::{FinishReason, Ticket, Usage};
use crate::policy::fair::FlowKey;
use ids::{BLOCK_TOKENS, BlockHash, HashKey, RequestId, Timestamp, TokenId, Tokens};
use std::sync::Arc;
use step::Sampling;

/// Place in line: priority, then what the tenant had had when the request got its first seat, then
/// arrival, then order of submission. Smaller runs first, and only the larger is preempted for it.
/// Total and fixed from the first seat on, so that no two requests can preempt each other in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    pub(crate) priority: i32,
    pub(crate) start: u64,
    pub(crate) arrival: Timestamp,
    pub(crate) order: u64,
}

/// A request's own data.
#[derive(Debug)]
pub struct Job {
    pub(crate) id: RequestId,
    pub(crate) rank: Rank,
    /// Whose counter it is charged to.
    pub(crate) flow: FlowKey,
    pub(crate) prompt: Arc<[TokenId]>,
    pub(crate) output: Vec<TokenId>,
    prompt_hashes: Arc<[BlockHash]>,
    /// Hashes after those of `prompt_hashes`.
    grown: Vec<BlockHash>,
    root: BlockHash,
    pub(crate) sampling: Arc<Sampling>,
    max_tokens: Tokens,
    end_tokens: Arc<[TokenId]>,
    ignore_eos: bool,
    stop_tokens: Arc<[TokenId]>,
    prompt_logprobs: Option<u8>,
    /// First prompt position whose log-probability was not delivered.
    pub(crate) logprobs_from: Tokens,
    pub(crate) deadline: Option<Timestamp>,
    /// When the scheduler looks at its deadline: then, or when it must have begun.
    pub(crate) alarm: Option<Timestamp>,
    /// Prompt tokens found in the cache at first admission.
    pub(crate) cached: Option<Tokens>,
    /// Whether it waited once for a step that takes its prompt whole.
    pub(crate) gave_way: bool,
    /// The upload that must have left before admission.
    pub(crate) upload: Ticket,
    /// Deaths of a worker that was running this request, since it last got further.
    pub(crate) deaths: u32,
    /// How far it might have come when a worker last died.
    pub(crate) danger: Tokens,
}

impl Job {
    pub(crate) fn new(submit: Submit, flow: FlowKey, order: u64) -> Self {
        let full = submit.prompt.len() / BLOCK_TOKENS as usize;
        let prompt_hashes = if submit.prompt_hashes.len() > full {
            submit.prompt_hashes[..full].into()
        } else {
            submit.prompt_hashes
        };
        Self {
            id: submit.request,
            rank: Rank { priority: submit.priority, start: 0, arrival: submit.arrival, order },
            flow,
            prompt: submit.prompt,
            output: Vec::new(),
            prompt_hashes,
            grown: Vec::new(),
            root: submit.root,
            sampling: submit.sampling,
            max_tokens: submit.max_tokens,
            end_tokens: submit.end_tokens,
            ignore_eos: submit.ignore_eos,
            stop_tokens: submit.stop_tokens,
            prompt_logprobs: submit.prompt_logprobs,
            logprobs_from: Tokens(1),
            deadline: submit.deadline,
            alarm: None,
            cached: None,
            gave_way: false,
            upload: Ticket::default(),
            deaths: 0,
            danger: Tokens::ZERO,
        }
    }

    pub(crate) fn prompt_tokens(&self) -> Tokens {
        tokens(self.prompt.len())
    }

    /// Prompt and confirmed output.
    pub(crate) fn known(&self) -> Tokens {
        tokens(self.prompt.len() + self.output.len())
    }

    /// KV positions the request can ever need: the last output token is never run.
    pub(crate) fn limit(&self) -> Tokens {
        Tokens(self.prompt_tokens().0 + self.max_tokens.0.max(1) - 1)
    }

    /// The log-probabilities that are still to be delivered.
    pub(crate) fn logprobs_due(&self) -> Option<u8> {
        self.prompt_logprobs.filter(|_| self.logprobs_from < self.prompt_tokens())
    }

    /// Hashes of the first `blocks` full blocks of what is known.
    pub(crate) fn hashes(&mut self, key: &HashKey, blocks: usize) -> Vec<BlockHash> {
        if blocks > 0 {
            self.hash(key, blocks - 1);
        }
        let given = self.prompt_hashes.iter().chain(&self.grown);
        given.take(blocks).copied().collect()
    }

    /// The hash of full block `i`; extends the chain as far as needed.
    pub(crate) fn hash(&mut self, key: &HashKey, i: usize) -> BlockHash {
        let given = self.prompt_hashes.len();
        while given + self.grown.len() <= i {
            let next = given + self.grown.len();
            let last = self.grown.last().or(self.prompt_hashes.last());
            let parent = last.copied().unwrap_or(self.root);
            let start = next * BLOCK_TOKENS as usize;
            let mut block = [TokenId(0); BLOCK_TOKENS as usize];
            for (at, token) in (start..).zip(&mut block) {
                *token = self.token(at);
            }
            self.grown.push(key.chain(parent, &block));
        }
        if i < given { self.prompt_hashes[i] } else { self.grown[i - given] }
    }

    fn token(&self, at: usize) -> TokenId {
        let output = |at: usize| self.output.get(at - self.prompt.len());
        let token = self.prompt.get(at).or_else(|| output(at)).copied();
        debug_assert!(token.is_some(), "only confirmed tokens are hashed");
        token.unwrap_or_default()
    }

    /// Makes room for the whole output and its hashes, so that no step allocates for it.
    pub(crate) fn reserve_output(&mut self) {
        // A limit far beyond what is usual is grown into, not reserved.
        const RESERVED: usize = 8192;
        let wanted = self.max_tokens.as_usize().min(RESERVED);
        self.output.reserve(wanted.saturating_sub(self.output.len()));
        let blocks = (self.prompt.len() + wanted) / BLOCK_TOKENS as usize + 1;
        let hashed = self.prompt_hashes.len() + self.grown.len();
        self.grown.reserve(blocks.saturating_sub(hashed));
    }

    /// Whether the output ends with the token just added.
    pub(crate) fn verdict(&self, token: TokenId) -> Option<FinishReason> {
        let generated = tokens(self.output.len());
        if generated >= self.sampling.min_tokens {
            let end = !self.ignore_eos && self.end_tokens.contains(&token);
            if end || self.stop_tokens.contains(&token) {
                return Some(FinishReason::Stop(token));
            }
        }
        (generated >= self.max_tokens).then_some(FinishReason::Length)
    }

    /// Output tokens still to come, at least and at most; a stop string may end it before.
    pub(crate) fn to_come(&self) -> (Tokens, Tokens) {
        let had = tokens(self.output.len());
        let most = self.max_tokens.saturating_sub(had);
        let ends = !self.ignore_eos && !self.end_tokens.is_empty();
        let may_end = ends || !self.stop_tokens.is_empty();
        let least = if may_end { self.sampling.min_tokens } else { self.max_tokens };
        (least.saturating_sub(had).min(most), most)
    }

    /// Whether a token may be generated at all.
    pub(crate) fn generates(&self) -> bool {
        !self.max_tokens.is_zero()
    }

    pub(crate) fn usage(&self) -> Usage {
        Usage {
            prompt: self.prompt_tokens(),
            cached: self.cached.unwrap_or_default(),
            output: tokens(self.output.len()),
        }
    }

    /// Whether it may only run alone: two workers died under it.
    pub(crate) fn suspect(&self) -> bool {
        self.deaths >= 2
    }
}

/// Lengths of sequences are bounded by `Config::max_context` at submission.
fn tokens(n: usize) -> Tokens {
    Tokens(u32::try_from(n).unwrap_or(u32::MAX))
}
