//! The scheduler in crowded, faulty worlds: at every depth, with every kind of cache.

use sim::scenario::Model;
use sim::{Figures, Scenario, World};

fn storm(seed: u64, events: u64, depth: u32, model: Model) -> Figures {
    let scenario = Scenario::storm(seed, events, depth, model).expect("carves");
    let world = World::new(scenario).expect("consistent");
    world.run().unwrap_or_else(|violation| {
        panic!("{violation} (cargo run -p sim -- --seed {seed} --events {events} --depth {depth} --model {model:?})")
    })
}

#[test]
fn short_storms() {
    for model in [Model::Full, Model::Sliding, Model::Mixed] {
        for depth in 0..=2 {
            for seed in 0..5 {
                let figures = storm(seed, 1500, depth, model);
                println!("{model:?} {depth} {seed} {figures:?}");
            }
        }
    }
}
