//! The scheduler in crowded, faulty worlds: at every depth, with every kind of cache.

use sim::coverage::Cell;
use sim::figures::Fault;
use sim::scenario::Model;
use sim::{Figures, Scenario, World};

fn storm(seed: u64, events: u64, depth: u32, model: Model) -> Figures {
    let scenario = Scenario::storm(seed, events, depth, model).expect("carves");
    let world = World::new(scenario).expect("consistent");
    world.run().unwrap_or_else(|violation| {
        panic!(
            "{violation}\nreplay with: cargo run -p sim -- --seed {seed} --events {events} \
             --depth {depth} --model {model:?} --shrink"
        )
    })
}

/// More than a million events: every seed another shape of cache, limits, load and group; every plan,
/// placement, output and refusal equal to the naive model's.
#[test]
fn no_storm_breaks_an_invariant() {
    let seeds = |first: u64| {
        let mut sum = Figures::default();
        for seed in (first..24).step_by(2) {
            for model in [Model::Full, Model::Sliding, Model::Mixed] {
                (0..=2).for_each(|depth| sum.add(&storm(seed, 5000, depth, model)));
            }
        }
        sum
    };
    let mut sum = Figures::default();
    std::thread::scope(|scope| {
        for half in [0, 1].map(|first| scope.spawn(move || seeds(first))) {
            sum.add(&half.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
    });
    eprintln!("{{{}}}", sum.json());
    for kind in [Cell::Legal, Cell::Refused] {
        let cells: Vec<_> = sum.coverage.cells(kind).collect();
        eprintln!("{kind:?}: {cells:?}");
    }
    // A storm in which nothing happened would prove nothing.
    assert!(sum.events >= 1_000_000);
    assert!(sum.full_cache_steps * 3 >= sum.steps, "the cache is hardly ever full");
    assert!(sum.tiered_steps * 5 >= sum.steps, "hardly any memory behind the cache");
    assert!(sum.full_tier_steps * 2 > sum.tiered_steps, "it is hardly ever full");
    assert!(sum.gauges.host_stores > 10_000 && sum.gauges.host_loads > 1000, "{sum:?}");
    assert!(sum.gauges.deaths >= 100 && sum.gauges.preemptions > 1000);
    assert!(sum.gauges.prefix_hit_tokens > 100_000 && sum.gauges.dropped_tokens > 1000);
    assert!(sum.gauges.purges > 0, "no pool was ever emptied for one request");
    for (meeting, phase, n) in sum.coverage.cells(Cell::Legal) {
        assert!(n >= 100, "{meeting:?} met {phase:?} {n} times");
    }
    for (meeting, phase, n) in sum.coverage.cells(Cell::Refused) {
        assert!(n >= 100, "{meeting:?} was refused {phase:?} {n} times");
    }
    for (fault, name) in Fault::ALL {
        assert!(sum.faults[fault as usize] >= 10, "{name}: {:?}", sum.faults);
    }
    for (kind, n) in scheduler::Unfit::ALL.iter().zip(sum.gauges.refused) {
        assert!(n > 0, "{} never happened", kind.label());
    }
    assert!(sum.ends.iter().all(|n| *n > 0), "every way to end: {:?}", sum.ends);
    // Of groups: each reason to place, shards without work, ranks that lied and were found out.
    assert!(sum.several >= 40 && sum.several * 3 < sum.runs, "{} of {}", sum.several, sum.runs);
    assert!(sum.placements.iter().all(|n| *n >= 500), "{:?}", sum.placements);
    assert!(sum.still > 10_000 && sum.divergences >= 300, "{} {}", sum.still, sum.divergences);
    let ended: u64 = sum.ends.iter().sum();
    assert!(sum.explained * 3 > ended, "the journal explained {} of {ended}", sum.explained);
}

/// Tenants told apart, patience, deadlines looked ahead at: what the model does not know, under the
/// same faults and all other checks.
#[test]
fn no_storm_breaks_an_invariant_where_tenants_share() {
    let mut sum = Figures::default();
    for seed in 100..106 {
        for model in [Model::Full, Model::Sliding, Model::Mixed] {
            for depth in 0..=2 {
                let storm = Scenario::storm(seed, 3000, depth, model).expect("carves");
                let figures = World::new(storm.shared()).expect("consistent").run();
                sum.add(&figures.unwrap_or_else(|violation| {
                    panic!(
                        "{violation}\nreplay with: cargo run -p sim -- --seed {seed} --events 3000 \
                         --depth {depth} --model {model:?} --shared --shrink"
                    )
                }));
            }
        }
    }
    assert!(sum.gauges.deaths >= 100 && sum.gauges.preemptions > 1000, "{sum:?}");
    assert!(sum.full_cache_steps * 5 > sum.steps, "the cache is hardly ever full");
}

/// A turn in which one is let in, gives way to one before it that there is no room for in the end, and no
/// step comes of it: its tokens must reach the next admission.
#[test]
fn one_let_in_and_put_back_in_a_turn_without_a_step_is_let_in_again() {
    for seed in [7, 105] {
        let storm = Scenario::storm(seed, 3000, 1, Model::Mixed).expect("carves").shared();
        let figures = World::new(storm).expect("consistent").run();
        figures.unwrap_or_else(|violation| panic!("{violation}"));
    }
}

#[test]
fn a_seed_is_a_run() {
    // One rank, and a group.
    for seed in [2, 3] {
        for depth in 0..=2 {
            let run = |seed| storm(seed, 4000, depth, Model::Mixed).digest;
            assert_eq!(run(seed), run(seed));
            assert_ne!(run(seed), run(seed + 1));
        }
    }
}

/// What is left of a run can be run alone, and all that happened in it is all of it.
#[test]
fn a_run_is_its_acts() {
    let scenario = Scenario::storm(5, 3000, 2, Model::Full).expect("carves");
    let world = World::new(scenario.clone()).expect("consistent");
    let log = world.log();
    let whole = world.run().expect("nothing is wrong");
    let acts = log.borrow().clone();
    let again = World::new(scenario.clone()).expect("consistent").only(acts.iter().copied()).run();
    assert_eq!(again.expect("nothing is wrong").digest, whole.digest);
    let few = World::new(scenario).expect("consistent").only(acts.into_iter().take(20)).run();
    let few = few.expect("nothing is wrong");
    assert!(few.requests > 0 && few.events < whole.events / 5, "{few:?}");
}
