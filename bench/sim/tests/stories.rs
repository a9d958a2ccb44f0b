//! What the scheduler promises, one short story each.

use core::time::Duration;
use ids::{RequestId, Timestamp, TokenId, Tokens};
use scheduler::{Config, Event, FinishReason, Refusal, Submit, Unfit, Usage, Waits};
use sim::replica::{Replica, full, limits, request, sliding};
use step::Sampling;

const R: RequestId = RequestId(1);

fn end(replica: &Replica, id: u64) -> FinishReason {
    replica.told[&RequestId(id)].end.expect("it ended").0
}

fn refusal(replica: &Replica, id: u64) -> Option<Refusal> {
    replica.told[&RequestId(id)].refused
}

fn refused(replica: &Replica, unfit: Unfit) -> u64 {
    replica.scheduler.gauges().refused[unfit as usize]
}

#[test]
fn usage_counts_prompt_cached_and_output() {
    let mut replica = Replica::new(limits(), &[full(0)], 64);
    replica.submit(request(1, 100, 7));
    replica.drive(|_, _| {});
    replica.submit(request(2, 100, 7));
    replica.drive(|_, _| {});
    let want = Usage { prompt: Tokens(100), cached: Tokens(64), output: Tokens(7) };
    assert_eq!(replica.told[&RequestId(2)].end, Some((FinishReason::Length, want)));
    let gauges = replica.scheduler.gauges();
    assert_eq!((gauges.prefix_query_tokens, gauges.prefix_hit_tokens), (200, 64));
}

#[test]
fn what_cannot_run_is_refused_with_its_numbers() {
    let config = Config { max_context: Tokens(1000), ..limits() };
    let mut replica = Replica::new(config, &[full(0)], 4);
    replica.submit(request(1, 900, 101));
    let (prompt, max_tokens, max_context) = (Tokens(900), Tokens(101), Tokens(1000));
    assert_eq!(refusal(&replica, 1), Some(Refusal::TooLong { prompt, max_tokens, max_context }));
    replica.submit(request(2, 200, 58));
    assert_eq!(
        refusal(&replica, 2),
        Some(Refusal::CacheTooSmall { tokens: Tokens(257), need: 5, have: 4 })
    );
    replica.submit(Submit { prompt: [].into(), ..request(3, 1, 1) });
    assert_eq!(refusal(&replica, 3), Some(Refusal::EmptyPrompt));
    replica.submit(Submit { deadline: Some(replica.now), ..request(4, 1, 1) });
    assert_eq!(refusal(&replica, 4), Some(Refusal::DeadlinePassed));
    // One token less than what was refused takes the whole cache and runs.
    replica.submit(request(5, 200, 57));
    replica.drive(|_, _| {});
    assert_eq!(end(&replica, 5), FinishReason::Length);
}

/// Chunks and prompt tokens of every step that has some, with prompts of these lengths.
fn chunks(prompts: &[u32]) -> Vec<(u32, u32)> {
    let step = Tokens(230);
    let config =
        Config { max_step_tokens: step, max_chunk: step, prefix_caching: false, ..limits() };
    let mut replica = Replica::new(config, &[full(0)], 256);
    for (id, prompt) in (1..).zip(prompts) {
        replica.submit(request(id, *prompt, 40));
    }
    replica.drive(|_, _| {});
    assert!(prompts.iter().zip(1..).all(|(_, id)| end(&replica, id) == FinishReason::Length));
    let reports = replica.reports.iter().filter(|report| report.chunks > 0);
    reports.map(|report| (report.chunks, report.prefill_tokens.0)).collect()
}

#[test]
fn a_prompt_that_nearly_fits_waits_for_the_step_that_takes_it_whole() {
    // Decoding requests take a token each of what follows.
    assert_eq!(chunks(&[100; 5]), [(2, 200), (2, 200), (1, 100)]);
    // Too much of the step would stay empty.
    assert_eq!(chunks(&[140; 3]), [(2, 230), (2, 190)]);
    // No step takes it whole.
    assert_eq!(chunks(&[200, 500])[..2], [(2, 230), (1, 229)]);
    // One that is under way goes on, and nobody waits behind it longer than for a step of its own.
    assert_eq!(chunks(&[430, 100]), [(1, 230), (1, 200), (1, 100)]);
}

#[test]
fn nobody_waits_twice_for_a_step_of_its_own() {
    let config = Config { prefix_caching: false, max_step_tokens: Tokens(400), ..limits() };
    // Every step of a long prompt leaves a quarter of the room.
    let mut replica =
        Replica::new(Config { max_chunk: Tokens(300), ..config.clone() }, &[full(0)], 256);
    replica.submit(request(1, 3000, 1));
    replica.submit(request(2, 150, 1));
    replica.drive(|_, _| {});
    let steps = replica.reports.iter().map(|report| (report.chunks, report.prefill_tokens.0));
    assert_eq!(steps.take(4).collect::<Vec<_>>(), [(1, 300), (2, 400), (2, 350), (1, 300)]);

    // So does every step of more urgent ones, of which there is always another.
    let mut replica = Replica::new(Config { max_chunk: Tokens(400), ..config }, &[full(0)], 256);
    let urgent = |id| Submit { priority: -1, ..request(id, 320, 1) };
    replica.submit(request(1, 150, 1));
    replica.submit(urgent(2));
    let mut seated = None;
    replica.drive(|replica, step| {
        if step < 40 {
            replica.submit(urgent(3 + step));
        }
        if seated.is_none() && replica.seated().contains(&RequestId(1)) {
            seated = Some(step);
        }
    });
    assert!(seated.is_some_and(|step| step < 5), "{seated:?}");
}

#[test]
fn nobody_is_late_for_a_step_behind_a_long_one() {
    let config = Config { prefix_caching: false, max_step_tokens: Tokens(1024), ..limits() };
    let mut replica = Replica::new(Config { max_chunk: Tokens(1024), ..config }, &[full(0)], 256);
    replica.submit(request(1, 4000, 1));
    replica.plan();
    let ahead = |replica: &Replica| replica.reports.iter().map(|r| r.ahead).max();
    assert_eq!(ahead(&replica), Some(1), "one runs, one waits for it");
    replica.submit(request(2, 100, 20));
    replica.drive(|_, _| {});
    assert_eq!((end(&replica, 1), end(&replica, 2)), (FinishReason::Length, FinishReason::Length));
    assert_eq!(ahead(&replica), Some(2), "short steps run as far ahead as they may");
    let long = replica.reports.iter().filter(|r| r.prefill_tokens.0 >= 512);
    assert!(long.map(|r| r.ahead).all(|ahead| ahead <= 1));
}

#[test]
fn the_queue_is_bounded_by_requests_and_by_tokens() {
    let config = Config { queue_requests: 2, queue_tokens: 100, ..limits() };
    let mut replica = Replica::new(config, &[full(0)], 64);
    replica.submit(request(1, 50, 5));
    replica.submit(request(2, 51, 5));
    let wait = Duration::from_secs(1);
    let waiting = Refusal::QueueTokens { waiting: 50, prompt: Tokens(51), limit: 100, wait };
    assert_eq!(refusal(&replica, 2), Some(waiting));
    replica.submit(request(3, 50, 5));
    replica.submit(request(4, 1, 5));
    assert_eq!(refusal(&replica, 4), Some(Refusal::QueueFull { waiting: 2, limit: 2, wait }));
    replica.plan();
    replica.submit(request(5, 100, 5));
    assert_eq!(refusal(&replica, 5), None, "those admitted count no more");
    replica.drive(|_, _| {});
}

#[test]
fn end_tokens_stop_tokens_and_minimum_are_heeded() {
    let free = |id| request(id, 40, 60);
    let mut replica = Replica::new(limits(), &[full(0)], 64);
    replica.submit(free(1));
    replica.drive(|_, _| {});
    let tokens = replica.told[&R].tokens.clone();
    let token = tokens[20];
    let first = tokens.iter().position(|t| *t == token).expect("it is there");
    let stop = Submit { stop_tokens: [token].into(), ..free(2) };
    let ends = Submit { end_tokens: [token].into(), ignore_eos: false, ..free(3) };
    let ignores = Submit { end_tokens: [token].into(), ignore_eos: true, ..free(4) };
    let least = Tokens(first as u32 + 2);
    let sampling = Sampling { min_tokens: least, ..Sampling::default() };
    let patient = Submit { sampling: sampling.into(), ..stop.clone() };
    replica.submit(stop);
    replica.submit(ends);
    replica.submit(ignores);
    replica.submit(Submit { request: RequestId(5), ..patient });
    replica.drive(|_, _| {});
    for id in [2, 3] {
        assert_eq!(end(&replica, id), FinishReason::Stop(token));
        assert_eq!(replica.told[&RequestId(id)].tokens, tokens[..=first]);
    }
    assert_eq!(end(&replica, 4), FinishReason::Length);
    assert!(replica.told[&RequestId(5)].tokens.len() > first + 1);
}

#[test]
fn nothing_to_generate_still_runs_the_prompt() {
    let mut replica = Replica::new(Config { max_chunk: Tokens(30), ..limits() }, &[full(0)], 64);
    replica.submit(Submit { prompt_logprobs: Some(3), ..request(1, 100, 0) });
    replica.drive(|replica, step| {
        // Parts told before a preemption are not told again.
        if step == 2 {
            replica.handle(Event::ForcePreempt(R));
        }
    });
    let told = &replica.told[&R];
    assert_eq!((told.tokens.len(), told.prompt_logprobs), (0, 99));
    assert_eq!(end(&replica, 1), FinishReason::Length);
}

#[test]
fn a_stop_string_keeps_what_the_text_kept() {
    let mut replica = Replica::new(limits(), &[full(0)], 64);
    replica.submit(request(1, 10, 100));
    replica.drive(|replica, _| {
        if replica.told[&R].tokens.len() == 9 && replica.told[&R].end.is_none() {
            replica.handle(Event::Stop { request: R, keep: Tokens(10) });
            assert_eq!(refused(replica, Unfit::StopBeyondOutput), 1, "it has nine");
            replica.handle(Event::Stop { request: R, keep: Tokens(7) });
        }
    });
    let (reason, usage) = replica.told[&R].end.expect("it ended");
    assert_eq!((reason, usage.output), (FinishReason::StopString, Tokens(7)));
    assert_eq!(replica.told[&R].tokens.len(), 9, "nothing was streamed after the stop");
    assert!(replica.scheduler.gauges().dropped_tokens > 0, "steps in flight ran on");
}

#[test]
fn an_abort_is_in_no_later_step() {
    for depth in 0..=2 {
        let mut replica = Replica::new(Config { depth, ..limits() }, &[full(0)], 64);
        replica.submit(request(1, 10, 100));
        replica.submit(request(2, 10, 30));
        replica.drive(|replica, step| {
            if step == 5 {
                replica.handle(Event::Abort(R));
                replica.retire();
                replica.plan();
                assert_eq!(replica.seated(), [RequestId(2)]);
                replica.handle(Event::Abort(R));
            }
        });
        assert_eq!(end(&replica, 1), FinishReason::Aborted);
        assert_eq!(end(&replica, 2), FinishReason::Length);
        let unfit = refused(&replica, Unfit::UnknownRequest) + refused(&replica, Unfit::WrongState);
        assert_eq!(unfit, 1, "the second abort changes nothing");
    }
}

#[test]
fn a_deadline_ends_the_waiting_and_the_running() {
    let mut replica = Replica::new(Config { max_running: 1, ..limits() }, &[full(0)], 64);
    let soon = replica.now.after(Duration::from_millis(200));
    replica.submit(Submit { deadline: Some(soon), ..request(1, 10, 100) });
    replica.submit(Submit { deadline: Some(soon), ..request(2, 10, 100) });
    assert_eq!(replica.scheduler.next_wakeup(), Some(soon));
    replica.drive(|_, _| {});
    assert_eq!(
        (end(&replica, 1), end(&replica, 2)),
        (FinishReason::Deadline, FinishReason::Deadline)
    );
    assert!(!replica.told[&R].tokens.is_empty());
    assert!(replica.told[&RequestId(2)].tokens.is_empty());
}

#[test]
fn priority_goes_first_then_arrival() {
    let mut replica = Replica::new(Config { max_running: 1, ..limits() }, &[full(0)], 64);
    replica.submit(Submit { priority: 1, ..request(1, 10, 3) });
    replica.submit(Submit { arrival: Timestamp(9), ..request(2, 10, 3) });
    replica.submit(Submit { arrival: Timestamp(8), ..request(3, 10, 3) });
    let mut order = Vec::new();
    replica.drive(|replica, _| {
        for request in replica.seated() {
            if !order.contains(&request) {
                order.push(request);
            }
        }
    });
    assert_eq!(order, [3, 2, 1].map(RequestId));
}

#[test]
fn the_least_urgent_gives_way_and_no_second_victim_is_taken() {
    // Three requests fill six blocks; each wants a third at about the same step.
    let mut replica = Replica::new(limits(), &[full(0)], 8);
    for (id, priority) in [(1, 0), (2, 5), (3, 1)] {
        replica.submit(Submit { priority, ..request(id, 65 + id as u32, 80) });
    }
    let mut preempted = Vec::new();
    replica.drive(|replica, _| {
        let report = *replica.reports.last().expect("a plan");
        if report.preempted > 0 && preempted.last() != Some(&(report.seq, report.preempted)) {
            preempted.push((report.seq, report.preempted));
            assert!(!replica.seated().contains(&RequestId(2)), "the least urgent gave way");
        }
    });
    assert!(!preempted.is_empty() && preempted.iter().all(|(_, n)| *n == 1), "{preempted:?}");
    assert!((1..=3).all(|id| end(&replica, id) == FinishReason::Length));
}

#[test]
fn everyone_who_waits_is_told_for_what() {
    let mut replica = Replica::new(Config { max_running: 2, ..limits() }, &[full(0)], 8);
    for id in 1..=4 {
        replica.submit(request(id, 70, 50));
    }
    replica.plan();
    let explained = replica.scheduler.explain();
    let slot = Waits::Slot { rows: 2, arriving: 0 };
    assert_eq!(explained, [(RequestId(3), slot), (RequestId(4), Waits::Turn { ahead: 1 })]);
    assert_eq!(replica.reports.last().and_then(|report| report.head), Some((RequestId(3), slot)));

    let mut replica = Replica::new(limits(), &[full(0)], 8);
    replica.submit(request(1, 250, 50));
    replica.submit(request(2, 350, 50));
    replica.plan();
    let [(RequestId(2), Waits::Blocks { need, mintable, arriving, .. })] =
        replica.scheduler.explain()[..]
    else {
        panic!("{:?}", replica.scheduler.explain());
    };
    assert!(need > mintable && arriving.is_zero());
    replica.drive(|_, _| {});
}

#[test]
fn nobody_inherits_the_shortage_of_one_who_left() {
    let mut replica = Replica::new(limits(), &[full(0)], 8);
    replica.submit(request(1, 250, 50));
    replica.submit(request(2, 350, 50));
    replica.plan();
    assert!(matches!(replica.scheduler.explain()[..], [(RequestId(2), Waits::Blocks { .. })]));
    replica.handle(Event::Abort(RequestId(2)));
    replica.submit(request(3, 60, 5));
    replica.retire();
    replica.plan();
    assert_eq!(replica.seated(), [RequestId(1), RequestId(3)]);
    replica.drive(|_, _| {});
}

#[test]
fn a_long_prompt_does_not_break_the_decode_budget() {
    let config = Config { decode_budget: Duration::from_millis(4), ..limits() };
    let mut replica = Replica::new(config, &[full(0)], 200);
    replica.submit(request(1, 10, 200));
    replica.submit(request(2, 1500, 2));
    // The checking worker takes no time; what it costs is said here.
    fn cost(decode: u32, prefill: u32) -> Duration {
        Duration::from_micros(2000 + 10 * u64::from(decode) + 10 * u64::from(prefill))
    }
    replica.cost = Some(cost);
    replica.drive(|_, _| {});
    replica.submit(request(3, 10, 200));
    replica.plan();
    let before = replica.reports.len();
    replica.submit(Submit { prompt_logprobs: Some(0), ..request(4, 3000, 2) });
    replica.drive(|_, _| {});
    let mixed: Vec<_> = replica.reports[before..]
        .iter()
        .filter(|report| report.decode > 0 && report.prefill_tokens.0 > 0)
        .collect();
    assert!(mixed.len() >= 10, "{} steps had a chunk beside a decode", mixed.len());
    for report in mixed {
        let took = cost(report.decode, report.prefill_tokens.0);
        assert!(took < Duration::from_micros(4400), "{took:?} for {}", report.prefill_tokens);
    }
}

#[test]
fn a_request_that_kills_workers_ends_alone() {
    let mut replica = Replica::new(limits(), &[full(0)], 64);
    for id in 1..=4 {
        replica.submit(request(id, 30, 40));
    }
    let mut beside = Vec::new();
    replica.drive(|replica, _| {
        let seated = replica.seated();
        if seated.contains(&RequestId(2)) && replica.told[&RequestId(2)].end.is_none() {
            beside.push(seated.len());
            replica.die();
        }
    });
    assert_eq!(beside, [4, 4, 1], "twice among others, then alone");
    assert_eq!(end(&replica, 2), FinishReason::WorkerDied { deaths: 3 });
    assert!([1, 3, 4].iter().all(|id| end(&replica, *id) == FinishReason::Length));
}

#[test]
fn a_worker_that_hangs_is_given_up_once() {
    let mut replica = Replica::new(limits(), &[full(0)], 64);
    replica.submit(request(1, 30, 40));
    replica.plan();
    let wakeup = replica.scheduler.next_wakeup().expect("a step is watched");
    replica.now = wakeup;
    replica.handle(Event::Wakeup);
    replica.handle(Event::Wakeup);
    assert_eq!(replica.condemned.len(), 1);
    replica.die();
    replica.drive(|_, _| {});
    assert_eq!(end(&replica, 1), FinishReason::Length);
}

#[test]
fn a_sliding_window_holds_little_however_long_the_sequence() {
    let mut replica = Replica::new(limits(), &[sliding(0, 100)], 12);
    replica.submit(request(1, 1000, 1000));
    replica.drive(|replica, _| {
        let counts = replica.scheduler.cache().expect("a life").counts(ids::GroupId(0));
        assert!(counts.total().0 <= 12);
    });
    assert_eq!(replica.told[&R].tokens.len(), 1000);
}

#[test]
fn a_long_table_is_released_in_slices() {
    let config = Config { release_slice: 4, max_step_tokens: Tokens(4096), ..limits() };
    let mut replica = Replica::new(Config { max_chunk: Tokens(4096), ..config }, &[full(0)], 64);
    replica.submit(request(1, 2000, 10));
    replica.submit(request(2, 10, 60));
    let mut held = Vec::new();
    replica.drive(|replica, _| {
        if replica.told[&R].end.is_some() {
            let counts = replica.scheduler.cache().expect("a life").counts(ids::GroupId(0));
            held.push(counts.shared.0);
        }
    });
    let falls: Vec<_> = held.windows(2).map(|pair| pair[0].saturating_sub(pair[1])).collect();
    assert!(falls.iter().all(|fall| *fall <= 8) && falls.iter().sum::<u32>() >= 20, "{held:?}");
}

#[test]
fn a_token_of_no_use_is_not_counted_as_output() {
    // One token is asked for; at depth 2 the slot must not run past it.
    let mut replica = Replica::new(limits(), &[full(0)], 64);
    replica.submit(request(1, 10, 1));
    replica.drive(|_, _| {});
    assert_eq!(replica.reports.len(), 1);
    assert_eq!(replica.told[&R].tokens.len(), 1);
    let never: &[TokenId] = &[];
    assert_eq!(&replica.told[&R].tokens[1..], never);
}
