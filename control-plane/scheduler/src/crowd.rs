//! What a queue holds of each class and tenant, and who has to give way in one that is full.
//!
//! Counts alone: it knows no request and no shard, so queues of several shards are one when they are
//! added. Invariant: the classes are the sums of their tenants, and the total is the sum of the classes.

use crate::config::Config;
use ids::{TenantId, Tokens};
use std::collections::{BTreeMap, BTreeSet};

/// Requests that never ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Backlog {
    pub(crate) requests: u32,
    /// Of their prompts.
    pub(crate) tokens: u64,
}

/// Everybody in a queue, as numbers.
#[derive(Clone, Debug)]
pub(crate) struct Crowd {
    patience: u64,
    limits: (u32, u64),
    tenants: BTreeMap<(i32, TenantId), Backlog>,
    /// Tenants by class and share of the queue.
    shares: BTreeSet<(i32, u64, TenantId)>,
    classes: BTreeMap<i32, Backlog>,
    total: Backlog,
}

impl Crowd {
    pub(crate) fn new(config: &Config) -> Self {
        Self {
            patience: config.patience.into(),
            limits: (config.queue_requests, config.queue_tokens),
            tenants: BTreeMap::new(),
            shares: BTreeSet::new(),
            classes: BTreeMap::new(),
            total: Backlog::default(),
        }
    }

    pub(crate) fn total(&self) -> Backlog {
        self.total
    }

    /// A request comes.
    pub(crate) fn add(&mut self, priority: i32, tenant: TenantId, prompt: Tokens) {
        self.book(priority, tenant, |backlog| {
            backlog.requests += 1;
            backlog.tokens += u64::from(prompt.0);
        });
    }

    /// A request leaves.
    pub(crate) fn remove(&mut self, priority: i32, tenant: TenantId, prompt: Tokens) {
        self.book(priority, tenant, |backlog| {
            backlog.requests -= 1;
            backlog.tokens -= u64::from(prompt.0);
        });
    }

    /// Adds another queue.
    pub(crate) fn join(&mut self, other: &Self) {
        for ((priority, tenant), more) in &other.tenants {
            self.book(*priority, *tenant, |backlog| {
                backlog.requests += more.requests;
                backlog.tokens += more.tokens;
            });
        }
    }

    /// The class of which a full queue gives up requests for this one, rather than refuse it: the
    /// worst that has more of the queue than it is warranted. It does so for a better class, for a
    /// class that has less than it is warranted, and for a tenant with less in line than another of
    /// the class.
    pub(crate) fn makes_room(
        &self,
        priority: i32,
        tenant: TenantId,
        prompt: Tokens,
    ) -> Option<i32> {
        let more = |mut backlog: Backlog| {
            backlog.requests += 1;
            backlog.tokens += u64::from(prompt.0);
            self.share(backlog)
        };
        let warranted = self.warranted();
        let over = |(_, backlog): &(&i32, &Backlog)| self.share(**backlog) > warranted;
        let (worst, _) = self.classes.iter().rev().find(over)?;
        let class = self.classes.get(&priority).copied().unwrap_or_default();
        if *worst != priority {
            let takes = *worst > priority || more(class) <= warranted;
            return takes.then_some(*worst);
        }
        let (share, largest) = self.largest(priority)?;
        let own = self.tenants.get(&(priority, tenant)).copied().unwrap_or_default();
        (tenant != largest && more(own) < share).then_some(priority)
    }

    /// The tenant of a class that has most in line, and its share.
    pub(crate) fn largest(&self, class: i32) -> Option<(u64, TenantId)> {
        let all = (class, 0, TenantId(0))..=(class, u64::MAX, TenantId(u64::MAX));
        self.shares.range(all).next_back().map(|(_, share, tenant)| (*share, *tenant))
    }

    /// The share of the queue that better classes leave to each.
    fn warranted(&self) -> u64 {
        if self.patience == 0 { 0 } else { (1 << 32) / (self.patience + 1) }
    }

    /// Changes what a tenant has in line.
    fn book(&mut self, priority: i32, tenant: TenantId, change: impl Fn(&mut Backlog)) {
        change(&mut self.total);
        let class = self.classes.entry(priority).or_default();
        change(class);
        if class.requests == 0 {
            self.classes.remove(&priority);
        }
        let before = self.tenants.get(&(priority, tenant)).copied().unwrap_or_default();
        let mut after = before;
        change(&mut after);
        self.shares.remove(&(priority, self.share(before), tenant));
        if after.requests == 0 {
            self.tenants.remove(&(priority, tenant));
        } else {
            self.tenants.insert((priority, tenant), after);
            self.shares.insert((priority, self.share(after), tenant));
        }
    }

    /// Of the queue, by requests or by tokens, whichever is more; in units of 2^-32.
    fn share(&self, backlog: Backlog) -> u64 {
        let part = |n: u64, of: u64| (u128::from(n) << 32) / u128::from(of.max(1));
        let (requests, tokens) = self.limits;
        let most = part(backlog.requests.into(), requests.into()).max(part(backlog.tokens, tokens));
        u64::try_from(most).unwrap_or(u64::MAX)
    }
}
