//! What is promised when more comes than can be served: most of the peak goes on, the queue is
//! bounded, tenants get alike, nobody starves. In virtual time; the figures are recorded elsewhere.

use core::time::Duration;
use ids::TenantId;
use sim::curves::{Policy, capacity, least_urgent, load, recovery, shares};
use sim::overload::{Setting, Source, Way, limits, run};

const SEED: u64 = 11;

#[test]
fn ten_times_the_capacity_leaves_nine_tenths_of_the_peak() {
    let capacity = capacity(SEED);
    let of = |offered| load(SEED, capacity, offered, Policy::Served);
    let loads = [1.0, 2.0, 10.0].map(of);
    let peak = loads.iter().map(|load| load.goodput).fold(0.0, f64::max);
    assert!(peak > 0.8 * capacity.output, "{peak} of {capacity:?}");
    let over = loads[2];
    assert!(over.goodput >= 0.9 * peak, "{over:?}, peak {peak}");
    assert!(over.queued_most <= limits().queue_requests);
    assert!(over.queued_tokens_most <= limits().queue_tokens);
    // Who is not served is told before anything was computed for it.
    let missed = over.ways[Way::Missed as usize] as f64;
    assert!(missed <= 0.02 * over.ways[Way::Done as usize] as f64, "{over:?}");
}

#[test]
fn an_overload_is_over_ten_seconds_after_its_end() {
    let took = recovery(SEED, capacity(SEED), 10.0);
    assert!(took.served <= Duration::from_secs(10), "{took:?}");
    assert!(took.empty <= Duration::from_secs(20), "{took:?}");
}

#[test]
fn tenants_with_work_get_alike_whatever_they_ask_for() {
    let shares = shares(SEED, capacity(SEED), Policy::Served);
    assert!(shares.jain > 0.98, "{}", shares.jain);
    assert!(shares.drift <= shares.bound, "{} of {}", shares.drift, shares.bound);
    // The one that asks for less than its share gets all of it at once.
    let small = shares.record.endings.iter().filter(|end| end.source == 0);
    let waits = small.map(|end| end.started.map(|at| at.since(end.arrival)));
    let longest = waits.map(|wait| wait.unwrap_or(Duration::MAX)).max().expect("it came");
    assert!(longest < Duration::from_secs(3), "{longest:?}");
}

#[test]
fn the_least_urgent_wait_no_longer_than_stated() {
    let least = least_urgent(SEED, capacity(SEED), 16);
    assert!(least.requests > 20 && least.done * 10 >= least.requests * 9, "{least:?}");
    assert_eq!(least.done + least.full, least.requests, "who got in is served: {least:?}");
    assert_eq!(least.over, 0, "{least:?}");
    assert!(!least.longest.is_zero() && least.longest <= least.bound, "{least:?}");
    // Without patience they would hardly be served at all.
    let never = least_urgent(SEED, capacity(SEED), 0);
    assert!(never.done * 4 < never.requests, "{never:?}");
    // What they get costs the urgent little.
    assert!(least.urgent_p99 <= 2 * never.urgent_p99, "{least:?}, {never:?}");
}

#[test]
fn whoever_is_turned_away_is_told_when_to_come_again() {
    let source = |tenant, priority, deadline| Source {
        tenant: TenantId(tenant),
        priority,
        rate: 200.0,
        prompt: (200, 1000),
        output: (20, 200),
        deadline,
        active: vec![(Duration::ZERO, Duration::from_secs(20))],
    };
    let sources = vec![
        source(1, 0, None),
        source(2, 0, Some(Duration::from_secs(4))),
        source(3, 1, None),
        Source { rate: 4.0, ..source(4, 0, None) },
    ];
    let record = run(&Setting { seed: SEED, config: limits(), blocks: 1200, sources });
    let mut seen = [0_u32; 6];
    for end in &record.endings {
        seen[end.way as usize] += 1;
        let turned_away = matches!(end.way, Way::Full | Way::Shed | Way::Unreachable);
        let told = end.retry_after.is_some_and(|wait| wait >= Duration::from_secs(1));
        assert_eq!(told, turned_away, "{end:?}");
        // The tenant with little in line is never the one who gives way.
        assert!(end.source != 3 || end.way == Way::Done, "{end:?}");
    }
    for way in [Way::Done, Way::Full, Way::Shed, Way::Unreachable] {
        assert!(seen[way as usize] > 50, "{way:?}: {seen:?}");
    }
    let figures = record.gauges;
    assert_eq!(figures.shed, u64::from(seen[Way::Shed as usize]));
    assert_eq!(figures.unreachable, u64::from(seen[Way::Unreachable as usize]));
}
