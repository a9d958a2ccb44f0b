//! The scheduler in crowded, faulty worlds: at every depth, with every kind of cache.

use sim::scenario::Model;
use sim::{Figures, Scenario, World};

fn storm(seed: u64, events: u64, depth: u32, model: Model) -> Figures {
    let scenario = Scenario::storm(seed, events, depth, model).expect("carves");
    let world = World::new(scenario).expect("consistent");
    world.run().unwrap_or_else(|violation| {
        panic!(
            "{violation}\nreplay with: cargo run -p sim -- --seed {seed} --events {events} \
             --depth {depth} --model {model:?}"
        )
    })
}

/// 1,080,000 events: every seed another shape of cache, limits and load.
#[test]
fn no_storm_breaks_an_invariant() {
    let mut sum = Figures::default();
    let mut ends = [0; 5];
    let mut refused = [0; scheduler::Unfit::COUNT];
    for seed in 0..24 {
        for model in [Model::Full, Model::Sliding, Model::Mixed] {
            for depth in 0..=2 {
                let figures = storm(seed, 5000, depth, model);
                sum.events += figures.events;
                sum.steps += figures.steps;
                sum.full_cache_steps += figures.full_cache_steps;
                sum.gauges.preemptions += figures.gauges.preemptions;
                sum.gauges.deaths += figures.gauges.deaths;
                sum.gauges.prefix_hit_tokens += figures.gauges.prefix_hit_tokens;
                sum.gauges.dropped_tokens += figures.gauges.dropped_tokens;
                sum.gauges.purges += figures.gauges.purges;
                sum.refused += figures.refused;
                ends.iter_mut().zip(figures.ends).for_each(|(sum, n)| *sum += n);
                refused.iter_mut().zip(figures.gauges.refused).for_each(|(sum, n)| *sum += n);
            }
        }
    }
    eprintln!("{sum:?} {ends:?} {refused:?}");
    // A storm in which nothing happened would prove nothing.
    assert!(sum.events >= 1_000_000);
    assert!(sum.full_cache_steps * 3 > sum.steps, "the cache is hardly ever full");
    assert!(sum.gauges.preemptions > 1000 && sum.gauges.deaths > 100);
    assert!(sum.gauges.prefix_hit_tokens > 100_000 && sum.gauges.dropped_tokens > 1000);
    assert!(sum.gauges.purges > 0, "no pool was ever emptied for one request");
    assert!(ends[..4].iter().all(|n| *n > 100), "every way to end: {ends:?}");
    for (kind, n) in scheduler::Unfit::ALL.iter().zip(refused) {
        assert!(n > 0, "{} never happened", kind.label());
    }
}

#[test]
fn a_seed_is_a_run() {
    for depth in 0..=2 {
        let (once, again) =
            (storm(3, 4000, depth, Model::Mixed), storm(3, 4000, depth, Model::Mixed));
        assert_eq!(once.digest, again.digest);
        assert_ne!(once.digest, storm(4, 4000, depth, Model::Mixed).digest);
    }
}

/// Cached blocks of the first in line, scattered over super-blocks, left no room for its next one
/// while nothing ran that could have made room.
#[test]
fn a_prefix_hit_that_pins_the_pool_is_given_up() {
    let figures = storm(1021, 40_000, 1, Model::Mixed);
    assert!(figures.gauges.purges > 0);
}
