//! The world's loop: whatever is next in virtual time happens, the schedulers of all shards answer,
//! everything they say is checked, and the naive model must have said the same.
//!
//! It makes no scheduling decision. Invariant: after each event the caches add up, every output is
//! one that its client can justify, every plan was carried out by every rank without complaint, and
//! refusals, placements, outputs, wake-ups and plans are those of the model.

use crate::act::Act;
use crate::client::{Client, VOCAB};
use crate::figures::Figures;
use crate::naive::Group;
use crate::ranks::Ranks;
use crate::rng::Rng;
use crate::scenario::Scenario;
use core::time::Duration;
use ids::{Blocks, GroupId, Incarnation, RequestId, ShardId, StepSeq, Timestamp, TokenId};
use scheduler::{Event, FinishReason, Joined, Scheduler, Shards, Submit, Unfit};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use step::StepPlan;

mod digest;
mod hear;
mod link;
mod meddle;
mod story;
mod traffic;

use story::Story;

/// Full recounts are made once in so many events.
const RECOUNT_EVERY: u64 = 16;
/// A run that needs this many times its events to settle is stuck.
const PATIENCE: u64 = 40;

/// What was wrong, and how to see it again.
#[derive(Clone, Debug, thiserror::Error)]
#[error("seed {seed}, event {event}: {what}")]
pub struct Violation {
    /// The seed.
    pub seed: u64,
    /// Events handled before.
    pub event: u64,
    /// What was found.
    pub what: String,
}

enum Happening {
    Arrive(u64),
    /// The next turn of a session.
    Turn(traffic::Turn),
    Abort(RequestId),
    Stop(RequestId, u32),
    Meddle(u64),
    /// Bytes from a rank of this life.
    Deliver(Incarnation, ids::Rank, Vec<u8>),
    Die(Incarnation),
    Ready,
}

/// The acts of a run so far; it can be read after a panic.
pub type Log = Rc<RefCell<Vec<Act>>>;

/// One seeded run.
pub struct World {
    scenario: Scenario,
    now: Timestamp,
    agenda: BTreeMap<(Timestamp, u64), Happening>,
    scheduled: u64,
    shards: Shards,
    model: Group,
    /// Acts that may happen; all when left out.
    only: Option<BTreeSet<Act>>,
    log: Log,
    ranks: Ranks,
    /// Plans sent and not answered, oldest first.
    sent: VecDeque<StepPlan>,
    /// Outcomes refused because an earlier one is missing.
    early: BTreeMap<StepSeq, Vec<u8>>,
    busy_until: Timestamp,
    clients: BTreeMap<RequestId, Client>,
    /// What was submitted under ids that ended not long ago.
    ended: VecDeque<Submit>,
    /// Ranks of requests that were never admitted.
    unstarted: BTreeSet<Rank>,
    documents: Vec<Vec<TokenId>>,
    /// Where each was put, of several shards.
    homes: BTreeMap<RequestId, ShardId>,
    /// Whether this life's workers gave reason to distrust them.
    misbehaved: bool,
    /// The rank of this life that has stopped answering.
    hung: Option<ids::Rank>,
    /// Whether the ranks of this life were found to disagree: nothing they say counts.
    diverged: bool,
    /// Steps of this life about which ranks lie to the others, and which those are.
    lied: BTreeMap<StepSeq, Vec<ids::Rank>>,
    story: Story,
    figures: Figures,
}

type Check<T = ()> = Result<T, String>;
/// Priority, arrival, id.
type Rank = (i32, Timestamp, RequestId);

impl World {
    /// A world at its beginning.
    ///
    /// # Errors
    /// When the scenario's limits contradict each other.
    pub fn new(scenario: Scenario) -> Result<Self, scheduler::ConfigError> {
        let mut rng = Rng::new(scenario.seed);
        let (config, mesh) = (&scenario.config, scenario.mesh);
        let shards = Shards::new(config, mesh.dp)?;
        let model = Group::new(config, mesh.dp);
        let ranks = Ranks::new(mesh, &scenario.groups, &scenario.carving, config.max_running);
        let several = u64::from(mesh.dp > 1);
        let documents =
            (0..4).map(|_| (0..scenario.prompt_most).map(|_| token(&mut rng)).collect()).collect();
        let story = Story::new(config.max_running, mesh.dp);
        let mut world = Self {
            scenario,
            now: Timestamp::ZERO,
            agenda: BTreeMap::new(),
            scheduled: 0,
            shards,
            model,
            only: None,
            log: Log::default(),
            ranks,
            sent: VecDeque::new(),
            early: BTreeMap::new(),
            busy_until: Timestamp::ZERO,
            clients: BTreeMap::new(),
            ended: VecDeque::new(),
            unstarted: BTreeSet::new(),
            documents,
            homes: BTreeMap::new(),
            misbehaved: false,
            hung: None,
            diverged: false,
            lied: BTreeMap::new(),
            story,
            figures: Figures { runs: 1, several, ..Figures::default() },
        };
        world.after(Duration::ZERO, Happening::Arrive(0));
        world.after(Duration::ZERO, Happening::Meddle(0));
        // The first requests come before there is a worker.
        world.after(Duration::from_millis(100), Happening::Ready);
        Ok(world)
    }

    /// The same world in which nothing but these acts happens.
    #[must_use]
    pub fn only(mut self, acts: impl IntoIterator<Item = Act>) -> Self {
        self.only = Some(acts.into_iter().collect());
        self
    }

    /// The acts of the run, as they happen.
    #[must_use]
    pub fn log(&self) -> Log {
        self.log.clone()
    }

    /// Runs to the end: the last request ended and nothing left to happen.
    ///
    /// # Errors
    /// At the first thing that is wrong.
    pub fn run(mut self) -> Result<Figures, Violation> {
        let seed = self.scenario.seed;
        match self.live() {
            Ok(()) => Ok(self.figures),
            Err(what) => Err(Violation { seed, event: self.figures.events, what }),
        }
    }

    fn live(&mut self) -> Check {
        loop {
            let next = self.agenda.first_key_value().map(|(at, _)| *at);
            let wakeup = self.shards.next_wakeup();
            self.same("next wake-up", &wakeup, &self.model.next_wakeup())?;
            match (next, wakeup) {
                (None, None) => return self.settle(),
                (Some((at, _)), Some(wake)) if wake < at => self.wake(wake)?,
                (None, Some(wake)) => self.wake(wake)?,
                (Some(key), _) => {
                    self.now = self.now.max(key.0);
                    if let Some(happening) = self.agenda.remove(&key) {
                        self.happen(happening)?;
                    }
                }
            }
            if self.figures.events > self.scenario.events.saturating_mul(PATIENCE) + 100_000 {
                let waits = self.shards.explain();
                return Err(format!("{} requests never end: {waits:?}", self.clients.len()));
            }
        }
    }

    fn wake(&mut self, at: Timestamp) -> Check {
        self.now = self.now.max(at);
        self.handle(Event::Wakeup)
    }

    /// Whether the world still lets new things happen.
    fn open(&self) -> bool {
        self.figures.events < self.scenario.events
    }

    /// Whether an act may happen; writes it down.
    fn acts(&mut self, act: Act) -> bool {
        let may = self.only.as_ref().is_none_or(|only| only.contains(&act));
        if may {
            self.log.borrow_mut().push(act);
        }
        may
    }

    /// Whether any act of this kind with this number or a later one may happen.
    fn expects(&self, first: Act, last: Act) -> bool {
        self.open()
            && self.only.as_ref().is_none_or(|only| only.range(first..=last).next().is_some())
    }

    fn happen(&mut self, happening: Happening) -> Check {
        match happening {
            Happening::Arrive(n) => self.arrive(n),
            Happening::Turn(turn) if self.open() => self.turn(turn),
            Happening::Turn(_) => Ok(()),
            Happening::Abort(request) => self.abort(request),
            Happening::Stop(request, keep) => self.stop(request, keep),
            Happening::Meddle(n) => self.meddle(n),
            Happening::Deliver(incarnation, rank, bytes) => self.deliver(incarnation, rank, bytes),
            Happening::Die(incarnation) => self.die(incarnation),
            Happening::Ready => self.begin_life(),
        }
    }

    fn abort(&mut self, request: RequestId) -> Check {
        if let Some(client) = self.clients.get_mut(&request) {
            client.asked.push(FinishReason::Aborted);
        }
        self.handle(Event::Abort(request))
    }

    fn stop(&mut self, request: RequestId, keep: u32) -> Check {
        if let Some(client) = self.clients.get_mut(&request) {
            client.keeps.push(keep);
        }
        self.handle(Event::Stop { request, keep: ids::Tokens(keep) })
    }

    fn die(&mut self, incarnation: Incarnation) -> Check {
        if incarnation != self.ranks.incarnation || !self.ranks.end() {
            return Ok(());
        }
        self.misbehaved = true;
        self.after(Duration::from_millis(50), Happening::Ready);
        // Sometimes only the next life tells that the last is over.
        if Rng::new(self.scenario.seed ^ incarnation.0).one_in(3) {
            return Ok(());
        }
        self.sent.clear();
        self.handle(Event::WorkerLost(incarnation))
    }

    fn begin_life(&mut self) -> Check {
        let ready = self.ranks.begin();
        self.sent.clear();
        self.early.clear();
        self.lied.clear();
        self.misbehaved = false;
        self.diverged = false;
        self.hung = None;
        self.busy_until = self.now;
        self.handle(Event::WorkerReady(Box::new(ready)))
    }

    /// Hands an event in, checks all that follows.
    fn handle(&mut self, event: Event) -> Check {
        self.tell(event)?;
        self.go_on()
    }

    /// Takes all that is said, has all carried out that can be planned.
    fn go_on(&mut self) -> Check {
        self.drain()?;
        while let Some(plan) = self.plan()? {
            self.note_plan(&plan);
            // Outputs said while planning are about later steps; the plan goes first.
            self.carry_out(plan)?;
            self.drain()?;
        }
        self.look();
        self.drain()?;
        self.check()
    }

    /// Tells schedulers and model; both must refuse for the same reasons or not at all.
    fn tell(&mut self, event: Event) -> Check {
        self.figures.events += 1;
        let met = self.figures.coverage.event(&self.model, self.now, &event);
        self.unless_apart(met)?;
        self.story.event(self.now, &event);
        let before = self.shards.gauges().refused;
        let wanted = self.model.handle(self.now, &event);
        self.shards.handle(self.now, event);
        self.refused_alike(&before, &wanted)?;
        loop {
            let (placement, wanted) = (self.shards.poll_placement(), self.model.poll_placement());
            self.same("placement", &placement, &wanted)?;
            let Some(placement) = placement else { return Ok(()) };
            self.figures.placements[placement.why as usize] += 1;
            self.story.placed(&placement);
            self.homes.insert(placement.request, placement.shard);
        }
    }

    /// The same for the result of a step.
    fn retire(&mut self, joined: Joined) -> Check {
        self.figures.events += 1;
        let met = self.figures.coverage.joined(&self.model, self.now, &joined);
        self.unless_apart(met)?;
        self.story.answered(self.now, &joined);
        while self.sent.front().is_some_and(|plan| plan.seq <= self.ranks.retired) {
            self.sent.pop_front().into_iter().for_each(|plan| self.shards.recycle(plan));
        }
        let before = self.shards.gauges().refused;
        let wanted = self.model.retire(self.now, &joined);
        self.shards.retire(self.now, joined);
        self.refused_alike(&before, wanted.as_slice())
    }

    fn refused_alike(&self, before: &[u64; Unfit::COUNT], wanted: &[Unfit]) -> Check {
        let after = self.shards.gauges().refused;
        let more = |unfit: Unfit| after[unfit as usize] - before[unfit as usize];
        let got = Unfit::ALL.into_iter().map(|unfit| (unfit.label(), more(unfit)));
        let count = |unfit| wanted.iter().filter(|other| **other == unfit).count() as u64;
        let wanted = Unfit::ALL.into_iter().map(|unfit| (unfit.label(), count(unfit)));
        let there = |(_, n): &(&str, u64)| *n > 0;
        let (got, wanted): (Vec<_>, Vec<_>) =
            (got.filter(there).collect(), wanted.filter(there).collect());
        self.same("refusals", &got, &wanted)
    }

    /// The next plan of both.
    fn plan(&mut self) -> Check<Option<StepPlan>> {
        let met = self.figures.coverage.late(&self.model, self.now);
        self.unless_apart(met)?;
        let planned = self.shards.plan_step(self.now);
        let wanted = self.model.plan_step(self.now);
        if let Some(planned) = &planned {
            if planned.report.decode + planned.report.chunks == 0 {
                return Err("a step that runs nothing".into());
            }
            self.look();
            self.story.planned(self.now, planned, self.shards.stalls());
        }
        let plan = planned.map(|planned| planned.plan);
        self.same("plan", &plan.as_ref().map(sorted), &wanted.as_ref().map(sorted))?;
        Ok(plan)
    }

    /// Whether the scheduler did what the model says.
    fn same<T: PartialEq + core::fmt::Debug>(&self, what: &str, got: &T, wanted: &T) -> Check {
        if got == wanted || !self.scenario.compared {
            return Ok(());
        }
        Err(format!("{what}: the scheduler says {got:?}\nthe model says {wanted:?}"))
    }

    /// What the model finds counts only while it is compared.
    fn unless_apart(&self, found: Check) -> Check {
        if self.scenario.compared { found } else { Ok(()) }
    }

    /// Notes who is first in each line.
    fn look(&mut self) {
        for (shard, scheduler) in (0..).map(ShardId).zip(self.shards.schedulers()) {
            self.story.looked(shard, scheduler.first_in_line());
        }
    }

    fn check(&mut self) -> Check {
        for cache in self.shards.schedulers().iter().filter_map(Scheduler::cache) {
            cache.check_totals().map_err(|imbalance| imbalance.to_string())?;
            if self.figures.events.is_multiple_of(RECOUNT_EVERY) {
                cache.check().map_err(|imbalance| imbalance.to_string())?;
            }
        }
        self.figures.explained += self.story.check(self.now)?;
        Ok(())
    }

    /// Counts the step as one with a full tier when every place behind the caches is taken, and as one with a
    /// full cache when at least 95 % of the caches' blocks hold something, where a super-block of no group
    /// counts as empty and one of a group by its free blocks.
    fn count_full(&mut self) {
        let (mut used, mut supers) = (0.0, 0.0);
        let (mut held, mut room) = (Blocks::ZERO, Blocks::ZERO);
        for cache in self.shards.schedulers().iter().filter_map(Scheduler::cache) {
            let of = |(i, per): (usize, &u32)| {
                let counts = cache.counts(GroupId(i as u8));
                f64::from((counts.total() - counts.free).0) / f64::from(*per)
            };
            used += self.scenario.carving.per_super.iter().enumerate().map(of).sum::<f64>();
            supers += f64::from(cache.supers());
            let behind = cache.behind();
            held += behind.0;
            room += behind.1;
        }
        self.figures.full_cache_steps += u64::from(supers > 0.0 && used >= 0.95 * supers);
        self.figures.tiered_steps += u64::from(!room.is_zero());
        self.figures.full_tier_steps += u64::from(!room.is_zero() && held == room);
    }

    /// Nothing can happen any more: nobody may be left, and nothing may be held.
    fn settle(&mut self) -> Check {
        if let Some(request) = self.clients.keys().next() {
            let waits = self.shards.explain();
            let caches =
                self.shards.schedulers().iter().filter_map(Scheduler::cache).map(|cache| {
                    let groups = (0..cache.groups()).map(|i| cache.counts(GroupId(i as u8)));
                    (groups.collect::<Vec<_>>(), cache.unbound(), cache.supers())
                });
            return Err(format!("{request} is stuck; {waits:?} {:?}", caches.collect::<Vec<_>>()));
        }
        for cache in self.shards.schedulers().iter().filter_map(Scheduler::cache) {
            cache.check().map_err(|imbalance| imbalance.to_string())?;
            for group in 0..cache.groups() {
                let counts = cache.counts(GroupId(group as u8));
                if !(counts.owned + counts.shared + counts.limbo).is_zero() {
                    return Err(format!("blocks are held at the end: {counts:?}"));
                }
            }
        }
        self.figures.wire_bytes += self.ranks.wire_bytes;
        self.figures.time = self.now;
        self.figures.gauges = self.shards.gauges();
        Ok(())
    }

    fn after(&mut self, delay: Duration, happening: Happening) {
        self.scheduled += 1;
        self.agenda.insert((self.now.after(delay), self.scheduled), happening);
    }
}

/// A plan whose sets are in order: who joins and leaves the decode set has no order of its own.
fn sorted(plan: &StepPlan) -> StepPlan {
    let mut plan = plan.clone();
    for section in &mut plan.sections {
        section.decode.join.sort_unstable();
        section.decode.leave.sort_unstable();
    }
    plan
}

fn token(rng: &mut Rng) -> TokenId {
    TokenId(1 + rng.below_u32(VOCAB - 1))
}

fn rank_of(client: &Client) -> Rank {
    (client.submit.priority, client.submit.arrival, client.submit.request)
}
