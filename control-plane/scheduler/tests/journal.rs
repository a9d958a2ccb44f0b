//! What the journal says of requests is what was done to them, and it stays within its bytes.

mod rig;

use ids::{Incarnation, RequestId, ShardId, StepSeq, Timestamp, TokenId, Tokens};
use rig::{Rig, STEP, parts};
use scheduler::{Ending, Event, History, Journal, NotKept, PlanReport, Planned, Role, Wait, Waits};
use std::time::Duration;
use step::{DecodeDelta, PrefillRun, Section, StepPlan, StepTiming};

const ROOM: usize = 4 << 20;

#[test]
fn a_request_that_runs_at_once_is_its_steps() {
    let mut rig = Rig::new(4, ROOM);
    rig.ready(64);
    rig.submit(1, 300, 5);
    rig.settle();
    let history = rig.history(1);
    // 300 tokens are three chunks, the last of which draws the first of five tokens.
    assert_eq!(parts(&history), [("prefill", "", 30), ("decode", "", 40)]);
    let roles: Vec<Role> = history.steps.iter().map(|step| step.role).collect();
    let chunk = |tokens, sample| Role::Prefill { tokens: Tokens(tokens), sample };
    let expected = [chunk(128, false), chunk(128, false), chunk(44, true)];
    assert_eq!(roles[..3], expected);
    assert!(roles.len() == 7 && roles[3..].iter().all(|role| *role == Role::Decode));
    assert_eq!(history.ending, Some((Ending::Length, Tokens(5))));
    assert_eq!(history.first_token, Some(Timestamp::ZERO.after(3 * STEP)));
    assert_eq!((history.prompt, history.cached), (Tokens(300), Tokens(0)));
    assert_eq!(history.end, rig.ended.get(&RequestId(1)).copied());
    each_took_its_time(&history);
}

/// The worker runs one step after another.
fn each_took_its_time(history: &History) {
    for step in &history.steps {
        let (start, answered) = step.start.zip(step.answered).expect("has ended");
        assert_eq!(answered.since(start), STEP, "{step:?}");
    }
}

#[test]
fn steps_launched_behind_the_end_are_not_told() {
    let mut rig = Rig::new(4, ROOM);
    rig.ready(64);
    // The first token is a stop token; two steps behind it are under way by then.
    rig.stop_tokens = vec![TokenId(1)];
    rig.submit(1, 10, 50);
    rig.settle();
    let history = rig.history(1);
    assert_eq!(history.ending, Some((Ending::Stop, Tokens(1))));
    assert_eq!((parts(&history), history.steps.len()), (vec![("prefill", "", 10)], 1));
}

#[test]
fn steps_under_way_are_found_across_segments() {
    let mut rig = Rig::new(4, ROOM);
    rig.ready(1000);
    rig.submit(1, 10, 30_000);
    for request in 2..3000 {
        rig.step();
        rig.submit(request, 10, 2);
        rig.step();
        assert_eq!(parts(&rig.history(request))[0].0, "ahead", "{request}");
    }
}

#[test]
fn outcomes_that_answer_nothing_leave_no_trace() {
    let mut rig = Rig::new(4, ROOM);
    rig.ready(64);
    rig.submit(1, 300, 5);
    let timing = StepTiming::default();
    let of_another_life = (Incarnation(9), StepSeq(1));
    let before_its_turn = (LIFE, StepSeq(2));
    for (life, seq) in [of_another_life, before_its_turn] {
        rig.journal.answered(rig.now, life, seq, &timing);
    }
    rig.step();
    rig.now = rig.now.after(STEP / 2);
    rig.journal.answered(rig.now, LIFE, StepSeq(1), &timing);
    rig.turn(None);
    rig.settle();
    assert_eq!(parts(&rig.history(1)), [("prefill", "", 30), ("decode", "", 40)]);
    each_took_its_time(&rig.history(1));
}

#[test]
fn who_waits_for_a_slot_is_told_whose() {
    let mut rig = Rig::new(1, ROOM);
    rig.ready(64);
    rig.submit(1, 10, 20);
    rig.step();
    rig.submit(2, 10, 2);
    rig.submit(3, 10, 2);
    rig.settle();
    // Came when three steps were under way; then the first held the slot to its last token, and until
    // the steps that were launched for it had ended.
    let second = parts(&rig.history(2));
    assert_eq!(second[0], ("ahead", "", 30), "{second:?}");
    assert_eq!(second[1].0, "queued");
    assert_eq!(second[1].1, "slot");
    let ran: u128 = second[2..].iter().map(|part| part.2).sum();
    assert_eq!(ran, 20, "{second:?}");
    let third = rig.history(3);
    let behind = third.spans.iter().filter_map(|span| span.part.waits());
    let heads: Vec<_> = behind.map(|(wait, word)| (format!("{wait:?}"), word)).collect();
    assert!(heads[0].0.contains("Behind") && heads[0].0.contains("RequestId(2)"), "{heads:?}");
    assert!(!heads.last().expect("it waited").0.contains("Behind"), "{heads:?}");
    parts(&third);
}

#[test]
fn steps_name_those_who_shared_them() {
    let mut rig = Rig::new(4, ROOM);
    rig.ready(64);
    rig.submit(1, 10, 30);
    rig.step();
    rig.submit(2, 200, 4);
    rig.settle();
    let first = rig.history(1);
    let beside: Vec<_> = first.steps.iter().flat_map(|step| step.beside.clone()).collect();
    let two = RequestId(2);
    assert_eq!(beside, [(two, Tokens(127)), (two, Tokens(73))], "127: one token decodes beside it");
    assert_eq!(first.mates, [(two, 5)], "two chunks, the second of which draws, and three tokens");
    let second = rig.history(2);
    assert_eq!(second.mates, [(RequestId(1), 5)]);
    assert!(second.steps.iter().all(|step| step.beside.is_empty() && step.decode >= 1));
}

#[test]
fn a_preempted_request_is_in_line_again() {
    let mut rig = Rig::new(2, ROOM);
    rig.ready(64);
    rig.submit(1, 100, 12);
    (0..5).for_each(|_| assert!(rig.step()));
    rig.turn(Some(Event::ForcePreempt(RequestId(1))));
    rig.settle();
    let history = rig.history(1);
    let parts = parts(&history);
    assert_eq!(history.preemptions, 1);
    let kinds: Vec<_> = parts.iter().map(|part| part.0).collect();
    // Three steps were under way for the seat that it lost.
    let expected = [
        ("prefill", "", 10),
        ("decode", "", 40),
        ("dropped", "", 30),
        ("prefill", "", 10),
        ("decode", "", 60),
    ];
    assert_eq!(parts, expected, "{kinds:?}");
    assert_eq!(history.steps.iter().filter(|step| step.dropped).count(), 3);
    let total: u128 = parts.iter().map(|part| part.2).sum();
    let lived = rig.ended[&RequestId(1)].since(history.arrival);
    assert_eq!(total, lived.as_millis());
    assert_eq!(rig.tokens[&RequestId(1)], 12);
}

#[test]
fn a_first_token_that_was_dropped_is_not_the_first() {
    let mut rig = Rig::new(2, ROOM);
    rig.ready(64);
    rig.submit(1, 100, 4);
    rig.turn(Some(Event::ForcePreempt(RequestId(1))));
    rig.settle();
    let history = rig.history(1);
    let kinds: Vec<_> = parts(&history).iter().map(|part| part.0).collect();
    assert_eq!(kinds[..2], ["dropped", "prefill"], "its only chunk was under way");
    // Three steps for nothing, then its prompt.
    assert_eq!(history.first_token, Some(Timestamp::ZERO.after(4 * STEP)));
    assert_eq!(rig.tokens[&RequestId(1)], 4);
}

#[test]
fn blocks_that_are_short_are_named() {
    let mut rig = Rig::new(4, ROOM);
    // Eight blocks: two requests grow beyond them.
    rig.ready(8);
    for request in 1..=3 {
        rig.submit(request, 120, 200);
    }
    rig.settle();
    let mut words = Vec::new();
    for request in 1..=3 {
        let history = rig.history(request);
        parts(&history);
        assert_eq!(history.ending, Some((Ending::Length, Tokens(200))));
        words.extend(parts(&history).iter().map(|part| format!("{} {}", part.0, part.1)));
    }
    for word in ["stalled blocks", "queued_again blocks"] {
        assert!(words.iter().any(|found| found == word), "{word}: {words:?}");
    }
}

#[test]
fn a_worker_that_dies_takes_its_steps_with_it() {
    let mut rig = Rig::new(2, ROOM);
    rig.submit(1, 10, 6);
    rig.now = rig.now.after(Duration::from_millis(7));
    rig.ready(64);
    rig.step();
    rig.now = rig.now.after(STEP / 2);
    rig.lose();
    rig.now = rig.now.after(Duration::from_millis(100));
    rig.ready(64);
    rig.settle();
    let history = rig.history(1);
    let expected = [
        ("queued", "worker", 7),
        ("prefill", "", 10),
        ("lost", "", 5),
        ("queued_again", "worker", 100),
        ("prefill", "", 10),
        ("decode", "", 40),
    ];
    assert_eq!(parts(&history), expected);
    assert_eq!(history.steps.iter().filter(|step| step.lost).count(), 3, "one ran, two were ahead");
}

#[test]
fn a_request_under_way_is_told_up_to_now() {
    let mut rig = Rig::new(1, ROOM);
    rig.ready(64);
    rig.submit(1, 10, 20);
    rig.submit(2, 10, 20);
    (0..4).for_each(|_| assert!(rig.step()));
    rig.now = rig.now.after(STEP / 2);
    let (first, second) = (rig.history(1), rig.history(2));
    assert_eq!(parts(&first), [("prefill", "", 10), ("decode", "", 35)]);
    assert!(first.end.is_none() && first.ending.is_none());
    let waited = parts(&second);
    assert_eq!(waited.last().map(|part| (part.0, part.1)), Some(("queued", "slot")));
    assert_eq!(waited.iter().map(|part| part.2).sum::<u128>(), 45);
}

#[test]
fn an_aborted_request_ends_where_it_was() {
    let mut rig = Rig::new(1, ROOM);
    rig.ready(64);
    rig.submit(1, 10, 50);
    rig.submit(2, 10, 50);
    (0..3).for_each(|_| assert!(rig.step()));
    rig.now = rig.now.after(STEP / 2);
    rig.turn(Some(Event::Abort(RequestId(1))));
    rig.turn(Some(Event::Abort(RequestId(2))));
    rig.settle();
    let (first, second) = (rig.history(1), rig.history(2));
    assert_eq!(parts(&first), [("prefill", "", 10), ("decode", "", 25)]);
    let last = *parts(&second).last().expect("it waited");
    assert_eq!((last.0, last.1), ("queued", "slot"));
    assert_eq!(second.ending, Some((Ending::Aborted, Tokens(0))));
}

#[test]
fn what_was_written_over_says_so_and_what_never_came_too() {
    let mut rig = Rig::new(2, 0);
    rig.ready(64);
    rig.submit(1, 10, 4);
    rig.settle();
    assert_eq!(parts(&rig.history(1)).len(), 2);
    for request in 2..2000 {
        rig.submit(request, 10, 4);
        rig.settle();
    }
    let pages = rig.journal.read(rig.now);
    let NotKept::WrittenOver { reach } = pages.history(RequestId(1)).expect_err("is gone") else {
        panic!("it did come in")
    };
    assert!(reach > STEP && reach < rig.now.since(Timestamp::ZERO), "{reach:?}");
    assert_eq!(pages.history(RequestId(2000)).expect_err("never came"), NotKept::Unknown);
    assert_eq!(parts(&rig.history(1999)).len(), 2);
}

#[test]
fn the_newest_request_may_be_written_over() {
    let mut rig = Rig::new(2, 0);
    rig.ready(1000);
    rig.submit(1, 10, 30_000);
    rig.submit(2, 10, 4);
    // Steps of the first alone write over all that was said of the second.
    (0..6000).for_each(|_| assert!(rig.step()));
    let gone = rig.journal.read(rig.now).history(RequestId(2)).expect_err("is gone");
    assert!(matches!(gone, NotKept::WrittenOver { .. }), "{gone:?}");
    let never = rig.journal.read(rig.now).history(RequestId(3)).expect_err("never came");
    assert_eq!(never, NotKept::Unknown);
}

#[test]
fn a_request_longer_than_the_journal_is_told_from_where_that_begins() {
    let mut rig = Rig::new(2, 0);
    rig.ready(1000);
    rig.submit(1, 10, 6000);
    rig.settle();
    let history = rig.history(1);
    assert!(history.cut && history.arrival > Timestamp::ZERO && history.first_token.is_none());
    assert_eq!(parts(&history).iter().filter(|part| part.0 == "decode").count(), 1);
    assert_eq!(history.end, rig.ended.get(&RequestId(1)).copied());
}

/// Numbers that look drawn, the same in every run.
fn draws(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    move |below| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    }
}

#[test]
fn whatever_happens_parts_add_up_and_every_token_has_its_step() {
    for seed in 0..40 {
        let (mut rig, mut draw) = (Rig::new(3, ROOM), draws(seed));
        rig.ready(24);
        for request in 1..60 {
            rig.submit(request, 1 + draw(300) as u32, 1 + draw(60) as u32);
            let before = RequestId(1 + draw(request));
            for _ in 0..draw(6) {
                rig.step();
            }
            match draw(12) {
                0 => rig.turn(Some(Event::Abort(before))),
                1 => rig.turn(Some(Event::ForcePreempt(before))),
                2 => rig.turn(Some(Event::Stop { request: before, keep: Tokens(1) })),
                3 => {
                    rig.lose();
                    rig.now = rig.now.after(STEP);
                    rig.ready(24);
                }
                // Somewhere within a step.
                _ => rig.now = rig.now.after(STEP / 3),
            }
        }
        rig.settle();
        for request in 1..60 {
            let history = rig.history(request);
            parts(&history);
            assert_eq!(
                history.end,
                rig.ended.get(&RequestId(request)).copied(),
                "{seed} {request}"
            );
            let (ending, _) = history.ending.expect("all have ended");
            let ran = history.steps.iter().filter(|step| !step.lost);
            let draws =
                ran.filter(|step| !matches!(step.role, Role::Prefill { sample: false, .. }));
            let tokens = rig.tokens.get(&RequestId(request)).copied().unwrap_or(0);
            // Samples of a request that lost its seat or was ended meanwhile are dropped.
            let dropped = history.preemptions > 0 || ending != Ending::Length;
            let (draws, tokens) = (draws.count(), tokens as usize);
            assert!(
                draws == tokens || draws > tokens && dropped,
                "{seed} {request}: {draws} {tokens}"
            );
        }
    }
}

/// A plan without a scheduler: 256 slots decode, and now and then one comes and goes.
fn plan(seq: u64) -> Planned {
    let slot = ids::SlotId((seq % 256) as u32);
    let churn = seq.is_multiple_of(16);
    let chunk = churn.then_some(PrefillRun { slot, tokens: Tokens(9), sample: true });
    let join = churn.then_some(slot).into_iter().collect();
    let section = Section {
        ops: Vec::new(),
        prefill: chunk.into_iter().collect(),
        decode: DecodeDelta { join, leave: Vec::new() },
    };
    let seq = StepSeq(seq);
    let plan = StepPlan {
        seq,
        incarnation: LIFE,
        bucket: Tokens(256),
        shard_tokens: vec![Tokens(256)],
        sections: vec![section],
    };
    Planned { plan, report: PlanReport { seq, ..PlanReport::default() } }
}

const LIFE: Incarnation = Incarnation(1);

#[test]
fn a_million_steps_stay_within_the_bytes_and_allocate_nothing() {
    let mut journal = Journal::new(1 << 20, 256, 1);
    let bytes = journal.bytes();
    assert!(bytes <= 1 << 20, "{bytes}");
    journal.ready(Timestamp::ZERO, LIFE);
    let plans: Vec<_> = (0..64).map(plan).collect();
    let mut now = Timestamp::ZERO;
    let allocated = allocation_counter::measure(|| {
        for step in 0..1_000_000 {
            let planned = &plans[step % plans.len()];
            let head = (RequestId(step as u64 / 2), Waits::Turn { ahead: step as u32 % 3 });
            journal.looked(ShardId(0), Some(head));
            journal.planned(now, planned, &[(RequestId(1), Waits::Upload)]);
            journal.sent(now, planned.plan.seq);
            now = now.after(STEP);
            journal.answered(now, LIFE, planned.plan.seq, &StepTiming::default());
            journal.delivered(now);
        }
    });
    assert_eq!((allocated.count_total, allocated.bytes_max), (0, 0), "{allocated:?}");
    assert_eq!(journal.bytes(), bytes);
    // Reading shares all but the newest segment.
    let read = allocation_counter::measure(|| drop(journal.read(now)));
    assert!(read.bytes_max < 100_000, "{read:?}");
}

#[test]
fn a_request_waits_behind_the_first_of_its_own_shard() {
    let mut journal = Journal::new(0, 2, 2);
    journal.ready(Timestamp::ZERO, LIFE);
    let mut rig = Rig::new(1, 0);
    rig.submit(7, 10, 1);
    journal.submitted(&rig.submits[0]);
    journal.placed(RequestId(7), ShardId(1));
    let waits = Waits::Slot { rows: 2, arriving: 0 };
    journal.looked(ShardId(1), Some((RequestId(3), waits)));
    journal.looked(ShardId(0), Some((RequestId(2), Waits::Upload)));
    journal.planned(Timestamp::ZERO, &plan(1), []);
    journal.sent(Timestamp::ZERO, StepSeq(1));
    let now = Timestamp::ZERO.after(STEP);
    let history = journal.read(now).history(RequestId(7)).expect("is kept");
    assert_eq!(parts(&history), [("queued", "slot", 10)]);
    let (wait, _) = history.spans[0].part.waits().expect("it waits");
    assert_eq!(wait, Wait::Behind { head: RequestId(3), waits });
}
