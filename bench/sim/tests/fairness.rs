//! Tenants, priorities and patience, one short story each.

use core::time::Duration;
use ids::{RequestId, TenantId, Tokens};
use scheduler::{Config, FinishReason, Refusal, Submit};
use sim::replica::{Replica, full, limits, request};

fn of(tenant: u64, submit: Submit) -> Submit {
    Submit { tenant: TenantId(tenant), ..submit }
}

fn urgent(priority: i32, submit: Submit) -> Submit {
    Submit { priority, ..submit }
}

/// Runs to the end; the order in which requests got their first seat.
fn order(replica: &mut Replica) -> Vec<u64> {
    let mut order = Vec::new();
    replica.drive(|replica, _| {
        for RequestId(id) in replica.seated() {
            if !order.contains(&id) {
                order.push(id);
            }
        }
    });
    order
}

fn reason(replica: &Replica, id: u64) -> Option<FinishReason> {
    replica.told[&RequestId(id)].end.map(|(reason, _)| reason)
}

#[test]
fn a_tenant_with_much_in_line_does_not_go_before_one_with_little() {
    let mut replica = Replica::new(Config { max_running: 1, ..limits() }, &[full(0)], 64);
    for id in 1..=5 {
        replica.submit(of(1, request(id, 10, 5)));
    }
    for id in 6..=7 {
        replica.submit(of(2, request(id, 10, 5)));
    }
    // In a better class tenants count apart.
    replica.submit(urgent(-1, of(1, request(8, 10, 5))));
    assert_eq!(order(&mut replica), [8, 1, 6, 2, 7, 3, 4, 5]);
}

#[test]
fn it_is_tokens_that_count_not_requests() {
    let mut replica = Replica::new(Config { max_running: 1, ..limits() }, &[full(0)], 64);
    replica.submit(of(1, request(1, 100, 50)));
    replica.submit(of(1, request(2, 100, 50)));
    for id in 3..=9 {
        replica.submit(of(2, request(id, 10, 10)));
    }
    // The first of the one had 200 virtual tokens, each of the other 30.
    assert_eq!(order(&mut replica), [1, 3, 4, 5, 6, 7, 8, 9, 2]);
}

#[test]
fn a_pause_earns_nothing() {
    let mut replica = Replica::new(Config { max_running: 1, ..limits() }, &[full(0)], 64);
    replica.submit(of(2, request(1, 10, 5)));
    for id in 2..=20 {
        replica.submit(of(1, request(id, 10, 5)));
    }
    let mut came = false;
    let mut order = Vec::new();
    replica.drive(|replica, _| {
        for RequestId(id) in replica.seated() {
            if !order.contains(&id) {
                order.push(id);
            }
        }
        // The second tenant comes back when the first had eight more.
        if order.len() == 10 && !came {
            came = true;
            for id in 21..=24 {
                replica.submit(of(2, request(id, 10, 5)));
            }
        }
    });
    let back = order.iter().position(|id| *id == 21).expect("it ran");
    assert!(back <= 11, "it is not behind what it did not ask for: {order:?}");
    let next: Vec<_> = order[back..back + 6].iter().map(|id| *id > 20).collect();
    assert_eq!(next, [true, false, true, false, true, false], "in turn from then on: {order:?}");
}

#[test]
fn of_those_behind_the_tenant_that_had_most_gives_way() {
    let mut replica = Replica::new(limits(), &[full(0)], 8);
    replica.submit(of(1, request(1, 120, 200)));
    replica.submit(of(1, request(2, 70, 200)));
    replica.plan();
    replica.submit(of(2, request(3, 70, 200)));
    let mut first = None;
    replica.drive(|replica, _| {
        let preempted: u32 = replica.reports.iter().map(|report| report.preempted).sum();
        if preempted > 0 && first.is_none() {
            first = Some(replica.seated());
        }
    });
    assert_eq!(first, Some(vec![RequestId(1), RequestId(3)]));
}

#[test]
fn the_longest_waiting_goes_first_in_the_end_and_keeps_its_seat() {
    let patient = |patience| {
        let config = Config { max_running: 1, patience, ..limits() };
        let mut replica = Replica::new(config, &[full(0)], 64);
        replica.submit(urgent(9, of(2, request(1, 10, 10))));
        for id in 2..=12 {
            replica.submit(urgent(0, of(1, request(id, 10, 10))));
        }
        let order = order(&mut replica);
        (order.iter().position(|id| *id == 1), replica.scheduler.gauges())
    };
    let (place, gauges) = patient(0);
    assert_eq!((place, gauges.overdue), (Some(11), 0));
    // Each has 30 virtual tokens, so four are served before it and one that was chosen already.
    let (place, gauges) = patient(4);
    assert!(matches!(place, Some(4 | 5)), "{place:?}");
    assert_eq!((gauges.overdue, gauges.preemptions), (1, 0));
}

#[test]
fn a_full_queue_makes_room_for_who_has_less_in_it_and_for_the_urgent() {
    let config = Config { max_running: 1, queue_requests: 3, ..limits() };
    let mut replica = Replica::new(config, &[full(0)], 64);
    let wait = Duration::from_secs(1);
    let full_queue = Some(Refusal::QueueFull { waiting: 3, limit: 3, wait });
    let shed = Some(FinishReason::Refused(Refusal::Shed { wait }));
    for id in 1..=4 {
        replica.submit(of(1, request(id, 10, 5)));
    }
    assert_eq!(replica.told[&RequestId(4)].refused, full_queue, "nobody has more than it");
    replica.submit(of(2, request(5, 10, 5)));
    assert_eq!((reason(&replica, 3), reason(&replica, 2)), (shed, None), "the last of the many");
    replica.submit(of(2, request(6, 10, 5)));
    assert_eq!(replica.told[&RequestId(6)].refused, full_queue, "two are as many as two");
    replica.submit(urgent(1, of(3, request(7, 10, 5))));
    assert_eq!(
        replica.told[&RequestId(7)].refused,
        full_queue,
        "nobody gives way to a worse class"
    );
    replica.submit(urgent(-1, of(3, request(8, 10, 5))));
    assert_eq!(reason(&replica, 2), shed);
    assert_eq!(order(&mut replica), [8, 1, 5]);
    assert_eq!(replica.scheduler.gauges().shed, 2);
}

#[test]
fn every_class_has_a_place_in_a_full_queue() {
    let config = Config { max_running: 1, queue_requests: 8, patience: 3, ..limits() };
    let mut replica = Replica::new(config, &[full(0)], 64);
    for id in 1..=8 {
        replica.submit(urgent(-1, of(1, request(id, 10, 5))));
    }
    // Two of eight are warranted to it.
    for id in 9..=11 {
        replica.submit(urgent(5, of(2, request(id, 10, 5))));
    }
    let refused = |id| replica.told[&RequestId(id)].refused.is_some();
    assert_eq!([9, 10, 11].map(refused), [false, false, true]);
    for id in 12..=14 {
        replica.submit(urgent(-1, of(3, request(id, 10, 5))));
    }
    assert_eq!([9, 10].map(|id| reason(&replica, id)), [None, None], "the urgent take none of it");
    replica.drive(|_, _| {});
}

#[test]
fn what_cannot_be_done_in_time_is_not_begun() {
    let config = Config { max_running: 1, refuse_late: true, ..limits() };
    let mut replica = Replica::new(config, &[full(0)], 64);
    replica.cost = Some(|_, _| Duration::from_millis(10));
    let within = |replica: &Replica, ms, submit: Submit| {
        let deadline = Some(replica.now.after(Duration::from_millis(ms)));
        Submit { deadline, ..submit }
    };
    // Before anything is known, nobody is refused.
    replica.submit(within(&replica, 400, request(1, 10, 30)));
    replica.drive(|_, _| {});
    assert_eq!(reason(&replica, 1), Some(FinishReason::Length));
    // Thirty tokens of 10 ms do not go into 200 ms, and nothing can end it before.
    let submit = Submit { end_tokens: [].into(), ..request(2, 10, 30) };
    replica.submit(within(&replica, 200, submit));
    let Some(FinishReason::Refused(Refusal::DeadlineUnreachable { needs, left, .. })) =
        reason(&replica, 2)
    else {
        panic!("{:?}", replica.told[&RequestId(2)]);
    };
    let expected = (Duration::from_millis(300), Duration::from_millis(200));
    assert!(needs.abs_diff(expected.0) < Duration::from_millis(3), "{needs:?}");
    assert_eq!(left, expected.1);
    // One that could be done at once waits behind another until it could not.
    replica.submit(request(3, 10, 60));
    let submit = Submit { end_tokens: [].into(), ..request(4, 10, 30) };
    replica.submit(within(&replica, 500, submit));
    let begun = replica.now;
    let mut ended = None;
    replica.drive(|replica, _| {
        if reason(replica, 4).is_some() && ended.is_none() {
            ended = Some(replica.now.since(begun));
        }
    });
    assert!(matches!(
        reason(&replica, 4),
        Some(FinishReason::Refused(Refusal::DeadlineUnreachable { .. }))
    ));
    let ended = ended.expect("it ended");
    assert!(
        ended < Duration::from_millis(300),
        "told while it could still go elsewhere: {ended:?}"
    );
    assert_eq!(replica.told[&RequestId(4)].tokens.len(), 0);
    assert_eq!(replica.told[&RequestId(3)].tokens.len(), Tokens(60).as_usize());
    assert_eq!(replica.scheduler.gauges().unreachable, 2);
}

#[test]
fn a_prompt_that_cannot_be_computed_in_time_is_not_begun() {
    let config = Config { refuse_late: true, ..limits() };
    let mut replica = Replica::new(config, &[full(0)], 64);
    replica.cost = Some(|_, prefill| Duration::from_millis(10 + u64::from(prefill)));
    for id in 1..=40 {
        replica.submit(request(id, 5 + 20 * (id as u32 % 7), 20));
        replica.drive(|_, _| {});
    }
    // Ten tokens go into 300 ms, a prompt of 500 beside them does not.
    let deadline = Some(replica.now.after(Duration::from_millis(300)));
    let submit = Submit { deadline, end_tokens: [].into(), ..request(41, 500, 10) };
    let begun = replica.now;
    replica.submit(submit);
    replica.drive(|_, _| {});
    let Some(FinishReason::Refused(Refusal::DeadlineUnreachable { needs, .. })) =
        reason(&replica, 41)
    else {
        panic!("{:?}", replica.told[&RequestId(41)]);
    };
    // Half a second of it is for the prompt, which nobody had looked up when it came.
    assert!(needs > Duration::from_millis(450) && needs < Duration::from_millis(700), "{needs:?}");
    assert_eq!(replica.now, begun, "nothing was computed for it");
}

#[test]
fn the_queue_is_bounded_in_tokens_too() {
    let config = Config { max_running: 1, queue_tokens: 64, ..limits() };
    let mut replica = Replica::new(config, &[full(0)], 64);
    for id in 1..=3 {
        replica.submit(of(1, request(id, 30, 5)));
    }
    let wait = Duration::from_secs(1);
    let full_queue = Refusal::QueueTokens { waiting: 60, prompt: Tokens(30), limit: 64, wait };
    assert_eq!(replica.told[&RequestId(3)].refused, Some(full_queue));
    // A tenant with less in it gets in, and takes no more than it needs.
    replica.submit(of(2, request(4, 20, 5)));
    assert_eq!((reason(&replica, 1), replica.scheduler.gauges().queued_tokens), (None, 50));
    assert_eq!(order(&mut replica), [1, 4]);
}
