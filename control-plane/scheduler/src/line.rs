//! Requests without a seat, and whose turn it is.
//!
//! The best class first. In a class those who lost a seat come back in order of rank, before all who
//! never ran; of these the tenant that had least is next, and within a tenant the first to arrive.
//! A choice that found blocks short stands until it is served or a better class waits, so that what
//! is freed for a large request is not taken by small ones again and again. Whatever its class and tenant, the request
//! that waits longest goes first once [`crate::Config::patience`] times its own virtual tokens were
//! served to others: nobody starves.
//!
//! It gives out no seat. Invariant: every request without a seat is in line once, and a choice
//! allocates nothing.

use crate::config::Config;
use crate::crowd::{Backlog, Crowd};
use crate::job::{Job, Rank};
use crate::policy::fair::{FlowKey, Ledger};
use crate::slab::Key;
use ids::{TenantId, Timestamp, Tokens};
use std::collections::BTreeMap;

/// Whose turn it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Turn {
    pub(crate) key: Key,
    /// It may take from those behind this rank.
    pub(crate) rank: Rank,
    /// The rank that it keeps once seated.
    pub(crate) seated: Rank,
}

/// A request that never ran.
#[derive(Clone, Copy, Debug)]
struct Entry {
    key: Key,
    prompt: Tokens,
    owes: u64,
}

/// Everyone who waits.
#[derive(Debug)]
pub(crate) struct Line {
    ledger: Ledger,
    patience: u64,
    /// Those who never ran, by flow, then arrival.
    queued: BTreeMap<(FlowKey, Timestamp, u64), Entry>,
    /// The same by order of submission.
    ages: BTreeMap<u64, (FlowKey, Timestamp)>,
    /// Those who lost a seat.
    returning: BTreeMap<Rank, Key>,
    /// The flow whose first request waits for blocks, and its class.
    held: Option<(i32, FlowKey)>,
    /// Virtual tokens served when the longest waiting became that.
    passed_from: u64,
    /// Of those who never ran.
    crowd: Crowd,
    /// Tokens that they are expected to compute first.
    owed: u64,
}

impl Line {
    pub(crate) fn new(config: &Config) -> Self {
        Self {
            ledger: Ledger::default(),
            patience: config.patience.into(),
            queued: BTreeMap::new(),
            ages: BTreeMap::new(),
            returning: BTreeMap::new(),
            held: None,
            passed_from: 0,
            crowd: Crowd::new(config),
            owed: 0,
        }
    }

    /// The flow of a new request; [`Line::leave`] must follow when it has ended.
    pub(crate) fn enter(&mut self, priority: i32, tenant: TenantId) -> FlowKey {
        self.ledger.enter(priority, tenant)
    }

    /// A request of the flow ended.
    pub(crate) fn leave(&mut self, flow: FlowKey) {
        self.ledger.leave(flow);
    }

    /// Adds what a request of the flow was given.
    pub(crate) fn charge(&mut self, flow: FlowKey, virtual_tokens: u64) {
        self.ledger.charge(flow, virtual_tokens);
    }

    /// Virtual tokens that a flow had.
    pub(crate) fn counter(&self, flow: FlowKey) -> u64 {
        self.ledger.counter(flow)
    }

    /// Requests in line, and of those that never ran their number and prompt tokens.
    pub(crate) fn len(&self) -> (usize, u32, u64) {
        let waiting = self.queued.len() + self.returning.len();
        let Backlog { requests, tokens } = self.crowd.total();
        (waiting, requests, tokens)
    }

    /// Takes a request that never ran, of which so many tokens are expected to be computed first.
    pub(crate) fn push(&mut self, job: &Job, key: Key, owes: u64) {
        let Rank { priority, arrival, order, .. } = job.rank;
        let (flow, prompt) = (job.flow, job.prompt_tokens());
        self.queued.insert((flow, arrival, order), Entry { key, prompt, owes });
        self.owed += owes;
        if self.ages.is_empty() {
            self.passed_from = self.ledger.served();
        }
        self.ages.insert(order, (flow, arrival));
        self.crowd.add(priority, self.ledger.tenant(flow), prompt);
        self.ledger.set_first(flow, self.first_of(flow).map(|(at, _)| at));
    }

    /// Takes back a request that had a seat.
    pub(crate) fn give_back(&mut self, rank: Rank, key: Key) {
        self.returning.insert(rank, key);
    }

    /// Takes a request out, wherever it stands.
    pub(crate) fn remove(&mut self, job: &Job) {
        if self.returning.remove(&job.rank).is_some() {
            return;
        }
        let Rank { priority, arrival, order, .. } = job.rank;
        let flow = job.flow;
        let Some(entry) = self.queued.remove(&(flow, arrival, order)) else { return };
        if self.ages.first_key_value().is_some_and(|(oldest, _)| *oldest == order) {
            self.passed_from = self.ledger.served();
        }
        self.ages.remove(&order);
        self.owed -= entry.owes;
        self.crowd.remove(priority, self.ledger.tenant(flow), entry.prompt);
        if self.held == Some((priority, flow)) {
            self.held = None;
        }
        self.ledger.set_first(flow, self.first_of(flow).map(|(at, _)| at));
    }

    /// Whose turn it is. `cost` says how many virtual tokens a request is likely to take.
    pub(crate) fn next(&mut self, cost: impl FnOnce(Key) -> u64) -> Option<Turn> {
        let returning = self.returning.first_key_value().map(|(rank, key)| {
            let (rank, key) = (*rank, *key);
            Turn { key, rank, seated: rank }
        });
        let Some((priority, flow)) = self.choose() else { return returning };
        let ((arrival, order), key) = self.first_of(flow)?;
        let rank = Rank { priority, start: self.ledger.counter(flow), arrival, order };
        let first = Turn { key, rank, seated: rank };
        let regular = returning.filter(|turn| turn.rank < rank).unwrap_or(first);
        Some(self.overdue(cost).filter(|turn| turn.key != first.key).unwrap_or(regular))
    }

    /// The turn stands: what comes free is for this request, if nobody of a better class comes.
    pub(crate) fn hold(&mut self, job: &Job) {
        self.held = Some((job.rank.priority, job.flow));
    }

    /// The flow that is next; the one held while its class is the best.
    fn choose(&mut self) -> Option<(i32, FlowKey)> {
        let next = self.ledger.next()?;
        Some(self.held.filter(|(priority, _)| *priority == next.0).unwrap_or(next))
    }

    /// The longest waiting, when it was passed over long enough. It takes nobody's seat, but once it
    /// has one it is behind nobody.
    fn overdue(&self, cost: impl FnOnce(Key) -> u64) -> Option<Turn> {
        if self.patience == 0 {
            return None;
        }
        let (order, (flow, arrival)) = self.ages.first_key_value()?;
        let (order, flow, arrival) = (*order, *flow, *arrival);
        let key = self.queued.get(&(flow, arrival, order))?.key;
        let passed = self.ledger.served() - self.passed_from;
        let seated = Rank { priority: i32::MIN, start: 0, arrival, order };
        let rank = Rank { priority: i32::MAX, start: u64::MAX, arrival, order };
        (passed >= self.patience.saturating_mul(cost(key))).then_some(Turn { key, rank, seated })
    }

    /// Tokens that those who never ran are expected to compute first.
    pub(crate) fn owed(&self) -> u64 {
        self.owed
    }

    /// What of the queue is whose.
    pub(crate) fn crowd(&self) -> &Crowd {
        &self.crowd
    }

    /// The last to come of a tenant's requests of a class that never ran: when, and which.
    pub(crate) fn last_of(&self, class: i32, tenant: TenantId) -> Option<((Timestamp, u64), Key)> {
        let flow = self.ledger.find(class, tenant)?;
        let last = (flow, Timestamp(u64::MAX), u64::MAX);
        let newest = self.queued.range((flow, Timestamp::ZERO, 0)..=last).next_back();
        newest.map(|((_, arrival, order), entry)| ((*arrival, *order), entry.key))
    }

    /// Everyone in line, about in the order of their turns: a tenant's later requests stand behind
    /// what its earlier ones will have been given.
    pub(crate) fn in_order(&self) -> Vec<Key> {
        let mut all: Vec<(Rank, Key)> =
            self.returning.iter().map(|(rank, key)| (*rank, *key)).collect();
        let mut ahead = (None, 0);
        for ((flow, arrival, order), entry) in &self.queued {
            if ahead.0 != Some(*flow) {
                ahead = (Some(*flow), self.ledger.counter(*flow));
            }
            let (priority, start) = (self.ledger.priority(*flow), ahead.1);
            all.push((Rank { priority, start, arrival: *arrival, order: *order }, entry.key));
            ahead.1 += u64::from(entry.prompt.0);
        }
        all.sort_unstable();
        all.into_iter().map(|(_, key)| key).collect()
    }

    fn first_of(&self, flow: FlowKey) -> Option<((Timestamp, u64), Key)> {
        let last = (flow, Timestamp(u64::MAX), u64::MAX);
        let first = self.queued.range((flow, Timestamp::ZERO, 0)..=last).next();
        first.map(|((_, arrival, order), entry)| ((*arrival, *order), entry.key))
    }
}
