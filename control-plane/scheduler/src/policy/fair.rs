//! How much each tenant has had: a counter of virtual tokens per tenant and priority class.
//!
//! Whoever has the smallest counter in a class is next. A tenant that begins to wait starts at the
//! class's clock, the smallest counter that waited when a choice was last made, so that idle time
//! earns nothing; one that has had more than the clock keeps its counter until the clock has passed
//! it, so that leaving for a moment earns nothing either. A charge is two additions; a choice costs
//! the logarithm of the tenants that wait and allocates nothing.
//!
//! It knows no request beyond a place in line. Invariant: a class exists while a request of it lives,
//! and at most [`DEBTORS`] tenants without a request are remembered in each.

use core::cmp::Reverse;
use ids::{TenantId, Timestamp};
use std::collections::binary_heap::PeekMut;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

/// Virtual tokens of a prompt token that is computed.
pub(crate) const PROMPT: u64 = 1;
/// Virtual tokens of an output token: it takes a row of a step of its own.
pub(crate) const OUTPUT: u64 = 2;
/// Tenants without a request whose counter is remembered, per class; of more, the least are forgiven.
const DEBTORS: usize = 4096;

/// A tenant's requests of one priority.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct FlowKey(u32);

/// When a request came in, and its number.
pub(crate) type Place = (Timestamp, u64);

#[derive(Debug)]
struct Flow {
    priority: i32,
    tenant: TenantId,
    counter: u64,
    /// Requests that have not ended.
    live: u32,
    /// The first that waits.
    first: Option<Place>,
}

#[derive(Debug, Default)]
struct Class {
    clock: u64,
    live: u32,
    /// Flows that wait.
    waiting: usize,
    /// Counters and first places as they were: never above the present ones by counter.
    heap: BinaryHeap<Reverse<(u64, Place, FlowKey)>>,
    /// Flows without a request, above the clock.
    debtors: BTreeSet<(u64, FlowKey)>,
}

/// Every tenant's counters.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    flows: Vec<Flow>,
    free: Vec<FlowKey>,
    names: BTreeMap<(i32, TenantId), FlowKey>,
    classes: BTreeMap<i32, Class>,
    /// Classes in which somebody waits.
    ready: BTreeSet<i32>,
    served: u64,
}

impl Ledger {
    /// The flow that a new request belongs to.
    pub(crate) fn enter(&mut self, priority: i32, tenant: TenantId) -> FlowKey {
        let class = self.classes.entry(priority).or_default();
        class.live += 1;
        if let Some(key) = self.names.get(&(priority, tenant)).copied() {
            let flow = &mut self.flows[key.0 as usize];
            if flow.live == 0 {
                class.debtors.remove(&(flow.counter, key));
            }
            flow.live += 1;
            return key;
        }
        let flow = Flow { priority, tenant, counter: class.clock, live: 1, first: None };
        let key = match self.free.pop() {
            Some(key) => {
                self.flows[key.0 as usize] = flow;
                key
            }
            None => {
                self.flows.push(flow);
                FlowKey(u32::try_from(self.flows.len() - 1).unwrap_or(u32::MAX))
            }
        };
        self.names.insert((priority, tenant), key);
        key
    }

    /// A request of the flow ended.
    pub(crate) fn leave(&mut self, key: FlowKey) {
        let flow = &mut self.flows[key.0 as usize];
        let priority = flow.priority;
        flow.live -= 1;
        let idle = flow.live == 0;
        let Some(class) = self.classes.get_mut(&priority) else { return };
        class.live -= 1;
        if idle {
            class.debtors.insert((flow.counter, key));
        }
        if class.live == 0 {
            // Nobody is left to whom anything would be owed.
            for (_, key) in core::mem::take(&mut class.debtors) {
                self.forget(key);
            }
            self.classes.remove(&priority);
        } else if idle {
            self.forgive(priority);
        }
    }

    /// The flow's first waiting request is now this one; none means that it waits no more.
    pub(crate) fn set_first(&mut self, key: FlowKey, first: Option<Place>) {
        let flow = &mut self.flows[key.0 as usize];
        let before = core::mem::replace(&mut flow.first, first);
        let (priority, tenant_waited) = (flow.priority, before.is_some());
        let Some(class) = self.classes.get_mut(&priority) else { return };
        match first {
            Some(place) if !tenant_waited => {
                let clock = tick(class, &self.flows, priority);
                let flow = &mut self.flows[key.0 as usize];
                flow.counter = flow.counter.max(clock);
                class.heap.push(Reverse((flow.counter, place, key)));
                class.waiting += 1;
                self.ready.insert(priority);
                // What was left by flows that waited once goes when it is most of the heap.
                if class.heap.len() > 2 * class.waiting + 16 {
                    rebuild(class, &self.flows, priority);
                }
            }
            // One before the known first: the entry would come up too late.
            Some(place) if before.is_some_and(|before| place < before) => {
                class.heap.push(Reverse((flow.counter, place, key)));
            }
            Some(_) => {}
            None if tenant_waited => {
                class.waiting -= 1;
                if class.waiting == 0 {
                    class.heap.clear();
                    self.ready.remove(&priority);
                }
            }
            None => {}
        }
    }

    /// The flow that is next, of the best class in which one waits.
    pub(crate) fn next(&mut self) -> Option<(i32, FlowKey)> {
        let priority = *self.ready.first()?;
        let class = self.classes.get_mut(&priority)?;
        tick(class, &self.flows, priority);
        class.heap.peek().map(|Reverse((_, _, key))| (priority, *key))
    }

    /// Adds what a request of the flow was given.
    pub(crate) fn charge(&mut self, key: FlowKey, virtual_tokens: u64) {
        self.flows[key.0 as usize].counter += virtual_tokens;
        self.served += virtual_tokens;
    }

    /// The flow of a tenant that has requests, or is remembered.
    pub(crate) fn find(&self, priority: i32, tenant: TenantId) -> Option<FlowKey> {
        self.names.get(&(priority, tenant)).copied()
    }

    /// The class of a flow.
    pub(crate) fn priority(&self, key: FlowKey) -> i32 {
        self.flows[key.0 as usize].priority
    }

    /// Whose the flow is.
    pub(crate) fn tenant(&self, key: FlowKey) -> TenantId {
        self.flows[key.0 as usize].tenant
    }

    /// What the flow had, and was forgiven.
    pub(crate) fn counter(&self, key: FlowKey) -> u64 {
        self.flows[key.0 as usize].counter
    }

    /// Virtual tokens given to anybody, ever.
    pub(crate) fn served(&self) -> u64 {
        self.served
    }

    /// Drops those whose debt the clock has passed, and the least of too many.
    fn forgive(&mut self, priority: i32) {
        while let Some(class) = self.classes.get_mut(&priority)
            && let Some((counter, key)) = class.debtors.first().copied()
            && (counter <= class.clock || class.debtors.len() > DEBTORS)
        {
            class.debtors.remove(&(counter, key));
            self.forget(key);
        }
    }

    fn forget(&mut self, key: FlowKey) {
        let flow = &self.flows[key.0 as usize];
        self.names.remove(&(flow.priority, flow.tenant));
        self.free.push(key);
    }
}

/// Brings the heap's top up to date and the clock to it.
fn tick(class: &mut Class, flows: &[Flow], priority: i32) -> u64 {
    while let Some(mut top) = class.heap.peek_mut() {
        let Reverse((counter, place, key)) = &mut *top;
        let flow = &flows[key.0 as usize];
        match flow.first {
            Some(first) if flow.priority == priority => {
                if (*counter, *place) == (flow.counter, first) {
                    class.clock = class.clock.max(flow.counter);
                    break;
                }
                (*counter, *place) = (flow.counter, first);
            }
            // It waits no more, or its number now stands for another.
            _ => {
                PeekMut::pop(top);
            }
        }
    }
    class.clock
}

/// The heap anew, without what is out of date.
fn rebuild(class: &mut Class, flows: &[Flow], priority: i32) {
    let mut keys: Vec<FlowKey> = class.heap.drain().map(|Reverse((_, _, key))| key).collect();
    keys.sort_unstable();
    keys.dedup();
    for key in keys {
        let flow = &flows[key.0 as usize];
        if let Some(first) = flow.first
            && flow.priority == priority
        {
            class.heap.push(Reverse((flow.counter, first, key)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: TenantId = TenantId(1);
    const B: TenantId = TenantId(2);

    fn place(n: u64) -> Place {
        (Timestamp(n), n)
    }

    /// A flow that waits from `n` on.
    fn waits(ledger: &mut Ledger, priority: i32, tenant: TenantId, n: u64) -> FlowKey {
        let key = ledger.enter(priority, tenant);
        ledger.set_first(key, Some(place(n)));
        key
    }

    #[test]
    fn the_least_served_of_the_best_class_is_next() {
        let mut ledger = Ledger::default();
        let low = waits(&mut ledger, 1, A, 1);
        let a = waits(&mut ledger, 0, A, 2);
        let b = waits(&mut ledger, 0, B, 3);
        assert_eq!(ledger.next(), Some((0, a)), "first come, at equal counters");
        ledger.charge(a, 10);
        assert_eq!(ledger.next(), Some((0, b)));
        ledger.charge(b, 11);
        assert_eq!(ledger.next(), Some((0, a)));
        ledger.set_first(a, None);
        ledger.set_first(b, None);
        assert_eq!(ledger.next(), Some((1, low)));
        ledger.set_first(low, None);
        assert_eq!(ledger.next(), None);
        assert_eq!(ledger.served(), 21);
    }

    #[test]
    fn idle_time_earns_nothing_and_leaving_forgives_nothing() {
        let mut ledger = Ledger::default();
        let a = waits(&mut ledger, 0, A, 1);
        for n in 2..100 {
            assert_eq!(ledger.next(), Some((0, a)));
            ledger.charge(a, 10);
            ledger.set_first(a, Some(place(n)));
        }
        assert_eq!(ledger.next(), Some((0, a)));
        let b = waits(&mut ledger, 0, B, 200);
        assert_eq!(ledger.counter(b), ledger.counter(a), "B starts where A stands");
        ledger.charge(b, 500);
        let had = ledger.counter(b);
        ledger.set_first(b, None);
        ledger.leave(b);
        let b = waits(&mut ledger, 0, B, 300);
        assert_eq!(ledger.counter(b), had, "it owes what it had");
        assert_eq!(ledger.next(), Some((0, a)));
    }

    #[test]
    fn debts_are_forgotten_when_the_clock_has_passed_them_or_nobody_is_left() {
        let mut ledger = Ledger::default();
        let a = waits(&mut ledger, 0, A, 1);
        for n in 0..10_000 {
            let tenant = waits(&mut ledger, 0, TenantId(10 + n), 10 + n);
            ledger.charge(tenant, 1 + n);
            ledger.set_first(tenant, None);
            ledger.leave(tenant);
        }
        assert!(ledger.names.len() <= DEBTORS + 1, "{}", ledger.names.len());
        assert!(ledger.classes[&0].heap.len() < 64, "{}", ledger.classes[&0].heap.len());
        ledger.charge(a, 1_000_000);
        assert_eq!(ledger.next(), Some((0, a)));
        let b = waits(&mut ledger, 0, B, 100_000);
        ledger.set_first(b, None);
        ledger.leave(b);
        assert_eq!(ledger.names.len(), 1, "all debts are below A's counter");
        ledger.set_first(a, None);
        ledger.leave(a);
        assert!(ledger.names.is_empty() && ledger.classes.is_empty());
        assert_eq!(ledger.flows.len(), ledger.free.len());
    }
}
