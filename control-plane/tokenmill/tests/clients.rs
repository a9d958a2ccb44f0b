//! Clients of a group of workers that leave, at every point of their request's life, or that do not read: what
//! they held is free soon after, and nobody else notices. At both doors that generate.

mod common;

use common::{Server, tokens, wait_until};
use serde_json::{Value, json};
use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// Two shards of two ranks without a model.
const GROUP: [&str; 6] =
    ["--max-model-len", "8192", "--data-parallel-size", "2", "--tensor-parallel-size", "2"];
/// The bundled model on two ranks.
const MODEL: [&str; 4] = ["--device", "cpu", "--tensor-parallel-size", "2"];
const SOON: Duration = Duration::from_secs(5);

fn group(more: &[&str]) -> Server {
    Server::start(&[&GROUP, more].concat())
}

/// Sends a request and reads nothing of the answer.
fn send(server: &Server, door: &str, body: &Value) -> TcpStream {
    let address = server.url.trim_start_matches("http://");
    let body = body.to_string();
    let mut connection = TcpStream::connect(address).expect("accepted");
    let head = format!(
        "POST {door} HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    connection.write_all(&[head.as_bytes(), body.as_bytes()].concat()).expect("sent");
    connection
}

fn completion(prompt: usize, tokens: u32, stream: bool) -> Value {
    json!({
        "model": "fake", "prompt": vec![5; prompt], "max_tokens": tokens, "temperature": 1, "seed": 5,
        "return_token_ids": true, "ignore_eos": true, "stream": stream,
    })
}

fn running(server: &Server) -> Option<f64> {
    server.metric("tokenmill_requests_running")
}

fn waiting(server: &Server) -> Option<f64> {
    server.metric("tokenmill_requests_waiting")
}

fn aborted(server: &Server) -> f64 {
    let name = "tokenmill_generations_total{finished_by=\"abort\"}";
    server.metric(name).expect("counted")
}

fn nothing_is_held(server: &Server) {
    wait_until("nothing is held", SOON, || {
        server.metric("tokenmill_kv_blocks{state=\"used\"}") == Some(0.0)
            && (running(server), waiting(server)) == (Some(0.0), Some(0.0))
    });
    assert_eq!(server.metric("tokenmill_worker_restarts_total"), Some(0.0));
}

fn steps(server: &Server) -> f64 {
    let name = |ahead| format!("tokenmill_steps_planned_total{{in_flight=\"{ahead}\"}}");
    (0..3).filter_map(|ahead| server.metric(&name(ahead))).sum()
}

#[test]
fn a_client_that_leaves_in_line_in_its_prompt_or_in_its_answer_is_done_with_at_once() {
    // Chunks of 100 tokens that take 50 ms, one seat in each shard.
    let server = group(&[
        "--fake-engine",
        "20000,0,300000",
        "--max-num-seqs",
        "1",
        "--max-num-batched-tokens",
        "100",
    ]);
    let door = "/v1/completions";
    for stream in [true, false] {
        // To its end a prompt of 7,000 would take 70 steps, an answer 1,000.
        for (state, prompt) in [("in its prompt", 7000), ("in its answer", 10)] {
            let before = aborted(&server);
            let left = send(&server, door, &completion(prompt, 1000, stream));
            wait_until(state, SOON, || running(&server) == Some(1.0));
            std::thread::sleep(Duration::from_millis(300));
            assert_eq!(aborted(&server), before, "{state}");
            let steps_before = steps(&server);
            drop(left);
            wait_until("aborted", SOON, || aborted(&server) == before + 1.0);
            nothing_is_held(&server);
            let more = steps(&server) - steps_before;
            assert!(more <= 20.0, "{state}: {more} more steps");
            std::thread::sleep(Duration::from_millis(200));
            assert_eq!(steps(&server) - steps_before, more, "{state}: nothing runs any more");
        }
        // Those in front go on.
        let before = aborted(&server);
        let others: Vec<_> =
            (0..2).map(|_| send(&server, door, &completion(10, 1000, true))).collect();
        wait_until("both seats are taken", SOON, || running(&server) == Some(2.0));
        let left = send(&server, door, &completion(10, 5, stream));
        wait_until("in line", SOON, || waiting(&server) == Some(1.0));
        drop(left);
        wait_until("not in line", SOON, || waiting(&server) == Some(0.0));
        assert_eq!((aborted(&server), running(&server)), (before + 1.0, Some(2.0)));
        drop(others);
        nothing_is_held(&server);
    }
}

/// Chats on a model, streamed and not.
#[test]
fn a_client_that_leaves_a_chat_is_done_with_at_once() {
    let server = Server::start(&MODEL);
    for stream in [true, false] {
        let before = aborted(&server);
        let asked = json!({
            "messages": [{"role": "user", "content": "What is a thread?"}], "max_tokens": 1900,
            "ignore_eos": true, "stream": stream,
        });
        let left = send(&server, "/v1/chat/completions", &asked);
        wait_until("under way", SOON, || running(&server) == Some(1.0));
        assert_eq!(aborted(&server), before);
        drop(left);
        wait_until("aborted", SOON, || aborted(&server) == before + 1.0);
        nothing_is_held(&server);
    }
}

/// Opens and leaves so many requests, a few at a time; some before anything is done for them, some after.
fn come_and_go(clients: u64) {
    let server = group(&["--fake-engine", "1000,0,0", "--max-num-seqs", "8"]);
    // What is there once and for all is there after the first few.
    let mut settled = 0;
    let opened = |from: u64, to: u64| {
        std::thread::scope(|scope| {
            for part in 0..4 {
                let server = &server;
                scope.spawn(move || {
                    for number in (from..to).filter(|number| number % 4 == part) {
                        let stream = number % 8 < 4;
                        let left = send(server, "/v1/completions", &completion(1500, 2000, stream));
                        std::thread::sleep(Duration::from_micros(number % 7 * 300));
                        drop(left);
                    }
                });
            }
        });
        nothing_is_held(&server);
    };
    for (from, to) in [(0, clients / 4), (clients / 4, clients)] {
        opened(from, to);
        let resident = server.resident_bytes();
        let grown = resident.saturating_sub(settled) >> 20;
        eprintln!("{to} clients: {} MiB", resident >> 20);
        assert!(from == 0 || grown < 24, "{grown} MiB more after {to} clients");
        settled = resident;
    }
    // Some left before their request had been read.
    assert!(aborted(&server) > clients as f64 * 0.5, "{} of {clients}", aborted(&server));
    assert_eq!(server.metric("tokenmill_generations_total{finished_by=\"length\"}"), Some(0.0));
    assert_eq!(server.post("/v1/completions", &completion(3, 3, false)).0, 200);
}

#[test]
fn ten_thousand_clients_that_leave_leave_nothing_behind() {
    come_and_go(10_000);
}

/// What another client gets beside one that reads nothing, and when.
fn beside(server: &Server, ask: &Value) -> Vec<u64> {
    let mut got = Vec::new();
    common::follow(&server.url, ask, |choice| got.extend(tokens(choice).map(|(token, _)| token)));
    got
}

fn is_given_up(server: &Server, door: &str, asked: &Value, choices: f64) {
    let other = json!({
        "prompt": [1, 2, 3], "max_tokens": 60, "temperature": 0, "seed": 1, "return_token_ids": true,
        "ignore_eos": true, "stream": true,
    });
    let expected = beside(server, &other);
    assert_eq!(expected.len(), 60);
    let (before, gone) = (server.resident_bytes(), aborted(server));
    let begun = Instant::now();
    let _deaf = send(server, door, asked);
    let stalled = || server.metric("tokenmill_stalled_clients_total");
    wait_until("it runs", SOON, || running(server) >= Some(1.0));
    assert_eq!(beside(server, &other), expected, "beside it");
    wait_until("given up", Duration::from_secs(30), || stalled() == Some(1.0));
    wait_until("aborted", SOON, || aborted(server) == gone + choices);
    let most = server.resident_bytes().saturating_sub(before) >> 20;
    eprintln!("{door}: given up after {:?}, {most} MiB more", begun.elapsed());
    assert!(most < 64, "{most} MiB for one client");
    nothing_is_held(server);
    assert_eq!(beside(server, &other), expected, "afterwards");
}

#[test]
fn a_client_that_reads_nothing_is_given_up_and_others_do_not_notice() {
    const STALL: [&str; 2] = ["--write-stall-ms", "500"];
    let server =
        group(&[&["--fake-engine", "1000,0,0", "--max-num-seqs", "80"], &STALL[..]].concat());
    let mut asked = completion(3, 8000, true);
    (asked["n"], asked["logprobs"]) = (json!(64), json!(5));
    is_given_up(&server, "/v1/completions", &asked, 64.0);
}

#[test]
fn a_client_that_reads_nothing_of_a_chat_is_given_up_and_others_do_not_notice() {
    let server = Server::start(&[&MODEL, &["--write-stall-ms", "500"][..]].concat());
    let asked = json!({
        "messages": [{"role": "user", "content": "What is a thread?"}], "max_tokens": 1900, "n": 16,
        "ignore_eos": true, "stream": true, "logprobs": true, "top_logprobs": 20,
    });
    is_given_up(&server, "/v1/chat/completions", &asked, 16.0);
}
