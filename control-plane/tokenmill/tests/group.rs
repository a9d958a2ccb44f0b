//! A group of worker processes under load: a rank that dies, hangs, lies, or is not heard for a while, and a
//! server that is told to stop. Clients see a pause, and each token once.
//!
//! The engine is the one without a model, whose tokens follow from seed and position alone, so that every
//! stream is known beforehand. Timing is bounded, not exact.

mod common;

use common::between::{Between, Way};
use common::{Server, ends, program, signal, wait_until};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::process::Command;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

/// Two shards of two ranks, steps of 3 ms, and a second for a step.
const GROUP: [&str; 10] = [
    "--fake-engine",
    "3000,0,0",
    "--max-model-len",
    "4096",
    "--data-parallel-size",
    "2",
    "--tensor-parallel-size",
    "2",
    "--step-timeout",
    "1",
];
const RANKS: u32 = 4;
const STREAMS: u64 = 6;
const TOKENS: u32 = 120;

fn with(more: &[&'static str]) -> Vec<&'static str> {
    GROUP.iter().chain(more).copied().collect()
}

fn body(seed: u64, tokens: u32) -> Value {
    json!({
        "model": "fake", "prompt": [1, 2, 3], "max_tokens": tokens, "temperature": 1, "seed": seed,
        "return_token_ids": true, "ignore_eos": true, "stream": true,
    })
}

/// Streams an answer to its end; `each` hears of every token.
fn follow(url: &str, seed: u64, mut each: impl FnMut()) -> Vec<u64> {
    let mut got = Vec::new();
    common::follow(url, &body(seed, TOKENS), |choice| {
        for (token, _) in common::tokens(choice) {
            got.push(token);
            each();
        }
    });
    got
}

/// Every stream at once; `disturb` runs when `after` tokens have come in all. Tokens by stream.
fn load(server: &Server, after: usize, disturb: impl FnOnce()) -> Vec<Vec<u64>> {
    std::thread::scope(|scope| {
        let (token, tokens) = mpsc::channel();
        let streams: Vec<_> = (0..STREAMS)
            .map(|seed| {
                let (url, token) = (server.url.as_str(), token.clone());
                scope.spawn(move || {
                    // Once enough have come nobody counts them.
                    follow(url, seed, || token.send(()).unwrap_or(()))
                })
            })
            .collect();
        drop(token);
        assert_eq!(tokens.iter().take(after).count(), after, "streams that go on");
        disturb();
        streams.into_iter().map(|stream| stream.join().expect("a whole stream")).collect()
    })
}

/// What the streams are when nothing disturbs them: those of one process.
fn undisturbed() -> Vec<Vec<u64>> {
    let alone = Server::start(&["--fake-engine", "0,0,0", "--max-model-len", "4096"]);
    let streams = load(&alone, 0, || ());
    assert!(streams.iter().all(|tokens| tokens.len() == TOKENS as usize));
    assert!(streams.windows(2).all(|pair| pair[0] != pair[1]), "each has tokens of its own");
    streams
}

fn restarts(server: &Server) -> f64 {
    server.metric("tokenmill_worker_restarts_total").expect("counted")
}

#[test]
fn a_rank_that_is_killed_takes_the_group_and_no_token() {
    let expected = undisturbed();
    let server = Server::start(&GROUP);
    for rank in 0..RANKS {
        let before = server.workers();
        assert_eq!(before.len(), RANKS as usize, "{before:?}");
        let got = load(&server, 200, || {
            signal("KILL", before[&rank]);
            let killed = Instant::now();
            wait_until("noticed", Duration::from_secs(2), || restarts(&server) > f64::from(rank));
            server.wait_ready(Duration::from_secs(5));
            assert!(killed.elapsed() < Duration::from_secs(5), "{:?}", killed.elapsed());
        });
        assert_eq!(got, expected, "rank {rank}");
        assert_eq!(restarts(&server), f64::from(rank + 1));
        let after = server.workers();
        assert!(before.values().all(|pid| !after.values().any(|now| now == pid)), "all are new");
        assert_eq!(after.len(), RANKS as usize);
    }
}

#[test]
fn a_rank_that_hangs_is_killed_with_the_group_and_no_token_is_lost() {
    let expected = undisturbed();
    let (server, log) = Server::start_logged(&GROUP);
    for rank in 0..RANKS {
        let got = load(&server, 200, || {
            signal("STOP", server.workers()[&rank]);
            let stopped = Instant::now();
            // One second for the step, and ten times what it usually takes.
            wait_until("noticed", Duration::from_secs(4), || restarts(&server) > f64::from(rank));
            assert!(stopped.elapsed() >= Duration::from_secs(1), "{:?}", stopped.elapsed());
            server.wait_ready(Duration::from_secs(5));
        });
        assert_eq!(got, expected, "rank {rank}");
        let text = log.lock().expect("no panic").clone();
        assert!(
            text.contains(&format!("was not answered by rank {rank} of dp 2 x tp 2")),
            "{text}"
        );
    }
}

/// Row by row a rank that says a digest of something else, and one that draws another token.
#[test]
fn a_rank_that_disagrees_is_named_and_nothing_of_its_step_is_streamed() {
    let expected = undisturbed();
    for (rank, fault) in [
        (0, "0,40,digest"),
        (1, "1,40,digest"),
        (2, "2,40,digest"),
        (3, "3,40,digest"),
        (0, "0,40,token"),
        (1, "1,40,token"),
        (2, "2,40,token"),
        (3, "3,40,token"),
    ] {
        let (server, log) = Server::start_logged(&with(&["--plant-fault", fault]));
        assert_eq!(load(&server, 0, || ()), expected, "{fault}");
        assert_eq!(server.metric("tokenmill_worker_divergences_total"), Some(1.0), "{fault}");
        assert_eq!(restarts(&server), 1.0, "{fault}");
        let text = log.lock().expect("no panic").clone();
        let shard = rank / 2;
        // A lead that drew another token is believed by its digest; of two nobody knows who is right.
        let named = if fault == "0,40,token" || fault == "2,40,token" { rank + 1 } else { rank };
        let words = format!("rank {named} of shard {shard} (its lead");
        assert!(text.contains(&words), "{fault}: {text}");
    }
}

#[test]
fn a_rank_that_is_not_heard_for_a_while_is_waited_for_and_one_for_long_is_not() {
    let expected = undisturbed();
    for (fault, kills) in [
        ("1,40,mute,600", 0.0),
        ("2,40,deaf,600", 0.0),
        ("0,40,mute,30000", 1.0),
        ("3,40,deaf,30000", 1.0),
    ] {
        let server = Server::start(&with(&["--plant-fault", fault]));
        let begun = Instant::now();
        assert_eq!(load(&server, 0, || ()), expected, "{fault}");
        assert!(begun.elapsed() < Duration::from_secs(12), "{fault}: {:?}", begun.elapsed());
        assert!(begun.elapsed() > Duration::from_millis(600), "{fault} happened");
        assert_eq!(restarts(&server), kills, "{fault}");
    }
}

/// A request that kills whoever runs it takes the group down twice in company and once alone, and ends with an
/// error of its own; nobody else loses anything.
#[test]
fn a_request_that_kills_its_workers_runs_alone_and_then_fails_by_itself() {
    const POISON: &str = "7777";
    const MESSAGE: &str = "the workers died several times while this request was running, at last while \
        nothing else was; it is not tried again";
    let expected = undisturbed();
    // It strikes eight tokens behind the poison: when five are generated.
    let prompt = [1, 2, 7777, 3, 4];
    let asked = |stream| {
        let mut asked = body(77, TOKENS);
        (asked["prompt"], asked["stream"]) = (json!(prompt), json!(stream));
        asked
    };
    let harmless = Server::start(&["--fake-engine", "0,0,0", "--max-model-len", "4096"]);
    let whole = harmless.ok("/v1/completions", &asked(false))["choices"][0]["token_ids"].clone();
    let whole = whole.as_array().expect("tokens");
    let late: Vec<_> = (10..14).map(|seed| follow(&harmless.url, seed, || ())).collect();
    for stream in [true, false] {
        let (server, log) = Server::start_logged(&with(&["--poison-token", POISON]));
        let client = reqwest::blocking::Client::new();
        let send =
            || client.post(format!("{}/v1/completions", server.url)).json(&asked(stream)).send();
        let got = std::thread::scope(|scope| {
            let (mut answer, mut later) = (None, Vec::new());
            let got = load(&server, 100, || {
                answer = Some(scope.spawn(send));
                let died = || restarts(&server) >= 2.0;
                wait_until("it died twice", Duration::from_secs(5), died);
                // Nobody suspects these, so that they would run beside it in another shard.
                let url = server.url.as_str();
                later.extend((10..14).map(|seed| scope.spawn(move || follow(url, seed, || ()))));
            });
            for (later, expected) in later.into_iter().zip(&late) {
                assert_eq!(&later.join().expect("a whole stream"), expected, "who came later");
            }
            let answer = answer.expect("asked").join().expect("no panic").expect("answered");
            let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
            let text = answer.text().expect("a whole body");
            let error = json!({"error": {"message": MESSAGE, "type": "server_error", "param": null,
                "code": "worker_lost"}});
            if stream {
                let mut events: Vec<Value> = text
                    .lines()
                    .filter_map(|line| line.strip_prefix("data: "))
                    .map(|data| serde_json::from_str(data).expect("JSON, and no [DONE]"))
                    .collect();
                assert_eq!((status, events.pop()), (200, Some(error)));
                let tokens =
                    events.iter().flat_map(|event| event["choices"][0]["token_ids"].as_array());
                let tokens: Vec<&Value> = tokens.flatten().collect();
                // The newest outcome may have died with the first process.
                assert!((4..=6).contains(&tokens.len()), "{tokens:?}");
                assert!(tokens.iter().copied().eq(&whole[..tokens.len()]), "each once");
            } else {
                assert_eq!(status, 500);
                assert_eq!(serde_json::from_str::<Value>(&text).expect("JSON"), error);
                assert_eq!(headers["x-should-retry"], "false");
                assert!(!headers.contains_key("retry-after"));
            }
            got
        });
        assert_eq!(got, expected, "the others");
        assert_eq!(restarts(&server), 3.0);
        let failed = server.metric("tokenmill_generations_total{finished_by=\"error\"}");
        assert_eq!(failed, Some(1.0));
        server.wait_ready(Duration::from_secs(2));
        assert_eq!(load(&server, 0, || ()), expected, "the engine lives");
        let text = log.lock().expect("no panic").clone();
        let beside: Vec<bool> = deaths(&text).map(|beside| beside > 0).collect();
        assert_eq!(beside.first(), Some(&true), "struck among others: {text}");
        assert_eq!(beside.last(), Some(&false), "and at last alone: {text}");
    }
}

/// How many tokens of others were in the steps in which a poison struck, as their processes logged it.
fn deaths(log: &str) -> impl Iterator<Item = u32> {
    let struck = log.lines().filter(|line| line.contains("poisoned"));
    struck.map(|line| {
        let (_, beside) = line.split_once("beside=").expect("how many");
        beside.trim().parse().expect("a number")
    })
}

/// What a rank is cut off from, and how.
struct Cut<'a> {
    rank: u32,
    ways: &'a [Way],
    between: Between,
    server: Server,
    log: Arc<Mutex<String>>,
}

impl Cut<'_> {
    fn lasts(&self, time: Duration) {
        self.between.block(self.rank, self.ways, time);
    }

    fn readiness(&self) -> u16 {
        self.server.get("/readyz").expect("answered").0
    }

    fn log(&self) -> String {
        self.log.lock().expect("no panic").clone()
    }
}

/// A group for each way in which one of these ranks can be cut off, beside each other, with so many seconds
/// for a step.
fn each_way(ranks: [u32; 3], timeout: &str, test: impl Fn(&Cut<'_>, &str) + Sync) {
    const WAYS: [&[Way]; 3] =
        [&[Way::ToWorker], &[Way::FromWorker], &[Way::ToWorker, Way::FromWorker]];
    let (test, args) = (&test, &[&GROUP[..9], &[timeout]].concat());
    std::thread::scope(|scope| {
        for (rank, ways) in ranks.into_iter().zip(WAYS) {
            scope.spawn(move || {
                let between = Between::new();
                let (server, log) = between.server(args);
                let cut = Cut { rank, ways, between, server, log };
                test(&cut, &format!("rank {rank}, {ways:?}"));
            });
        }
    });
}

#[test]
fn a_rank_that_is_cut_off_for_a_second_is_waited_for() {
    const PAUSE: Duration = Duration::from_secs(1);
    let expected = undisturbed();
    each_way([1, 0, 3], "3", |cut, what| {
        let begun = Instant::now();
        let got = load(&cut.server, 100, || {
            cut.lasts(PAUSE);
            assert_eq!(cut.readiness(), 200, "{what}: no client's matter");
        });
        assert_eq!(got, expected, "{what}");
        assert!(begun.elapsed() > PAUSE && cut.between.late() > 0, "{what}");
        assert_eq!((restarts(&cut.server), cut.log().as_str()), (0.0, ""), "{what}");
    });
}

/// The group is given up after the step's time; what a rank of it had said comes when nobody listens any more.
#[test]
fn a_rank_that_is_cut_off_for_long_ends_the_group_and_comes_too_late() {
    const PAUSE: Duration = Duration::from_secs(3);
    let expected = undisturbed();
    each_way([2, 1, 0], "1", |cut, what| {
        let got = load(&cut.server, 100, || {
            std::thread::scope(|scope| {
                scope.spawn(|| cut.lasts(PAUSE));
                let noticed = || restarts(&cut.server) > 0.0;
                wait_until("noticed", PAUSE - Duration::from_millis(500), noticed);
                assert_eq!(cut.readiness(), 503, "{what}");
            });
            cut.server.wait_ready(Duration::from_secs(5));
        });
        assert_eq!(got, expected, "{what}");
        assert_eq!(load(&cut.server, 0, || ()), expected, "{what}, afterwards");
        assert_eq!(restarts(&cut.server), 1.0, "{what}");
        assert!(cut.between.late() > 0, "{what}: something came late");
        let (text, rank) = (cut.log(), cut.rank);
        let words = format!("was not answered by rank {rank} of dp 2 x tp 2");
        assert!(text.contains(&words), "{what}: {text}");
    });
}

#[test]
fn clients_that_leave_a_group_leave_nothing_behind() {
    let server = Server::start(&with(&["--max-num-seqs", "3"]));
    let open = |seed| {
        let client = reqwest::blocking::Client::new();
        let url = format!("{}/v1/completions", server.url);
        client.post(url).json(&body(seed, 3000)).send().expect("accepted")
    };
    // Six run, three in each shard; the others wait.
    let opened = std::thread::scope(|scope| {
        let opening: Vec<_> = (0..9).map(|seed| scope.spawn(move || open(seed))).collect();
        let metric = |name: &str| server.metric(name);
        wait_until("six run, three wait", Duration::from_secs(5), || {
            metric("tokenmill_requests_running") == Some(6.0)
                && metric("tokenmill_requests_waiting") == Some(3.0)
        });
        opening.into_iter().map(|opened| opened.join().expect("opened")).collect::<Vec<_>>()
    });
    drop(opened);
    wait_until("no block is held", Duration::from_secs(5), || {
        server.metric("tokenmill_kv_blocks{state=\"used\"}") == Some(0.0)
            && server.metric("tokenmill_requests_waiting") == Some(0.0)
    });
    let aborted = server.metric("tokenmill_generations_total{finished_by=\"abort\"}");
    assert_eq!(aborted, Some(9.0));
    assert_eq!(restarts(&server), 0.0);
}

#[test]
fn requests_are_placed_on_shards_and_the_reasons_are_counted() {
    let server = Server::start(&GROUP);
    let placed = |by: &str| {
        let name = format!("tokenmill_placements_total{{placed_by=\"{by}\"}}");
        server.metric(&name).expect("counted")
    };
    let prompt: Vec<u64> = (0..300).collect();
    let turn = |more: u64| {
        let prompt: Vec<u64> = prompt.iter().copied().chain(1000..1000 + more).collect();
        let asked = json!({"model": "fake", "prompt": prompt, "max_tokens": 3, "ignore_eos": true});
        let answer = server.ok("/v1/completions", &asked);
        answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64()
    };
    assert_eq!(turn(0), Some(0));
    assert_eq!((placed("load"), placed("prefix")), (1.0, 0.0));
    // Whichever shard's turn it is, the prefix decides.
    for more in 1..=3 {
        assert_eq!(turn(more), Some(256));
    }
    assert_eq!((placed("load"), placed("prefix")), (1.0, 3.0));
}

#[test]
fn a_group_that_is_told_to_stop_finishes_what_runs_and_a_second_time_ends_at_once() {
    let expected = undisturbed();
    let mut server = Server::start(&GROUP);
    let workers = server.workers();
    let pid = server.pid();
    let got = load(&server, 100, || {
        signal("TERM", pid);
        let told = Instant::now();
        wait_until("not ready at once", Duration::from_millis(200), || {
            !server.get("/readyz").is_ok_and(|(status, _)| status == 200)
        });
        assert!(told.elapsed() < Duration::from_millis(200), "{:?}", told.elapsed());
    });
    assert_eq!(got, expected);
    assert_eq!(server.wait().code(), Some(0), "an orderly end");
    let gone =
        || workers.values().all(|pid| !std::path::Path::new(&format!("/proc/{pid}")).exists());
    wait_until("no worker is left", Duration::from_secs(2), gone);

    let mut server = Server::start(&GROUP);
    let url = server.url.clone();
    let (begun, begins) = mpsc::channel();
    let cut = std::thread::spawn(move || {
        let client = reqwest::blocking::Client::new();
        let sent = client.post(format!("{url}/v1/completions")).json(&body(1, 3000)).send();
        let _ = begun.send(());
        let lines = BufReader::new(sent.expect("accepted")).lines();
        lines.map_while(Result::ok).any(|line| line == "data: [DONE]")
    });
    begins.recv().expect("accepted");
    signal("TERM", server.pid());
    std::thread::sleep(Duration::from_millis(300));
    signal("TERM", server.pid());
    let told = Instant::now();
    assert_eq!(server.wait().code(), Some(130));
    assert!(told.elapsed() < Duration::from_secs(2));
    assert!(!cut.join().expect("no panic"), "the stream was cut, not ended");
}

/// A scheduler that is gone is not to be served beside: the process ends and says why.
#[test]
fn a_scheduler_that_panics_ends_the_server_with_its_words() {
    let (mut server, log) = Server::start_logged(&with(&["--panic-at-step", "30"]));
    let workers = server.workers();
    let client = reqwest::blocking::Client::new();
    let sent = client.post(format!("{}/v1/completions", server.url)).json(&body(1, 3000)).send();
    let text = sent.expect("accepted").text().unwrap_or_default();
    assert!(
        !text.contains("[DONE]") || text.contains("\"error\""),
        "not as if it were whole: {text}"
    );
    let begun = Instant::now();
    assert_eq!(server.wait().code(), Some(1));
    assert!(begun.elapsed() < Duration::from_secs(5));
    let gone =
        || workers.values().all(|pid| !std::path::Path::new(&format!("/proc/{pid}")).exists());
    wait_until("no worker is left", Duration::from_secs(2), gone);
    wait_until("said why", Duration::from_secs(2), || {
        let text = log.lock().expect("no panic").clone();
        text.contains("the scheduler panicked") && text.contains("planted at step 30")
    });
}

#[test]
fn what_a_group_cannot_be_is_refused() {
    let refused = |args: &[&str]| {
        let output = ends(Command::new(program()).arg("serve").args(args).args(["--port", "0"]));
        assert!(!output.status.success(), "{args:?} was served");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let fake = ["--fake-engine", "0,0,0"];
    let text = refused(&[&fake[..], &["--data-parallel-size", "0"]].concat());
    assert!(text.contains("--data-parallel-size 0 times --tensor-parallel-size 1"), "{text}");
    let text = refused(&[&fake[..], &["--tensor-parallel-size", "257"]].concat());
    assert!(text.contains("from 1 to 256 ranks"), "{text}");
    let text = refused(&[&fake[..], &["--plant-fault", "1,2,nothing"]].concat());
    assert!(text.contains("RANK,STEP,digest|token"), "{text}");
}
