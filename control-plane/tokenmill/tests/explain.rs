//! `tokenmill explain` through HTTP: parts add up to what the client measured, and say what it waited for.

mod common;

use common::{Server, program};
use reqwest::blocking::Client;
use serde_json::{Value, json};
use std::io::Read;
use std::process::Command;
use std::time::{Duration, Instant};

/// One slot and steps of 5 ms, so that waits are known beforehand.
const FAKE: [&str; 6] =
    ["--fake-engine", "5000,0,0", "--max-model-len", "4096", "--max-num-seqs", "1"];

/// What a client knows of its request.
struct Asked {
    id: String,
    body_id: String,
    took: Duration,
}

fn body(prompt: u64, length: u64, tokens: u32) -> Value {
    let prompt: Vec<u64> = (0..length).map(|i| (prompt * 131 + i * 7) % 250).collect();
    json!({
        "prompt": prompt, "max_tokens": tokens, "ignore_eos": true, "return_token_ids": true,
        "temperature": 0,
    })
}

fn ask(http: &Client, url: &str, body: &Value, name: Option<&str>) -> Asked {
    let mut request = http.post(format!("{url}/v1/completions")).json(body);
    if let Some(name) = name {
        request = request.header("x-request-id", name);
    }
    let begun = Instant::now();
    let mut response = request.send().expect("answers");
    let mut text = String::new();
    response.read_to_string(&mut text).expect("whole");
    let took = begun.elapsed();
    assert_eq!(response.status(), 200, "{text}");
    let id = response.headers()["x-request-id"].to_str().expect("text").to_owned();
    let first = text.strip_prefix("data:").map_or(&*text, |rest| rest.lines().next().unwrap_or(""));
    let json: Value = serde_json::from_str(first).expect("JSON");
    Asked { id, body_id: json["id"].as_str().expect("an id").to_owned(), took }
}

fn explain(server: &Server, id: &str) -> (u16, Value) {
    let (status, text) = server.get(&format!("/admin/requests/{id}")).expect("answers");
    (status, serde_json::from_str(&text).expect("JSON"))
}

fn stories(answer: &Value) -> Vec<&Value> {
    let generations = answer["generations"].as_array().expect("a list");
    generations.iter().map(|generation| &generation["story"]).collect()
}

/// Parts that touch; their names, what is waited for, and milliseconds.
fn parts(story: &Value) -> Vec<(String, String, f64)> {
    let mut at = 0.0;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let parts = story["parts"].as_array().unwrap_or_else(|| panic!("{story}"));
    let part = |part: &Value| {
        let (from, ms) = (part["from_ms"].as_f64(), part["ms"].as_f64().expect("a number"));
        assert!(
            (from.expect("a number") - at).abs() < 1e-6 && ms >= 0.0,
            "a hole at {at}: {story}"
        );
        at += ms;
        (text(&part["part"]), text(&part["for"]), ms)
    };
    parts.iter().map(part).collect()
}

fn sum(story: &Value) -> f64 {
    parts(story).iter().map(|part| part.2).sum()
}

/// A connection that is open before anything is measured.
fn connected(server: &Server) -> Client {
    let http = Client::builder().timeout(Duration::from_secs(60)).build().expect("a client");
    ask(&http, &server.url, &body(99, 4, 1), None);
    http
}

#[test]
fn parts_add_up_to_what_the_client_measured_on_the_cpu_worker() {
    let server = Server::start(&[
        "--device",
        "cpu",
        "--max-num-seqs",
        "8",
        "--max-num-batched-tokens",
        "64",
    ]);
    let http = connected(&server);
    let mut off = Vec::new();
    for round in 0..6 {
        let mut body = body(round, 150, 24);
        body["stream"] = json!(round % 2 == 0);
        body["n"] = json!(1 + round % 3);
        // Somebody else's prompt runs beside it.
        let other = std::thread::spawn({
            let (url, http) = (server.url.clone(), http.clone());
            move || ask(&http, &url, &self::body(1000 + round, 200, 4), None)
        });
        let asked = ask(&http, &server.url, &body, None);
        other.join().expect("no panic");
        let (status, answer) = explain(&server, &asked.body_id);
        assert_eq!(status, 200, "{answer}");
        let stories = stories(&answer);
        assert_eq!(stories.len() as u64, 1 + round % 3);
        let client = asked.took.as_secs_f64() * 1e3;
        for story in stories {
            assert_eq!((&story["state"], &story["output_tokens"]), (&json!("ended"), &json!(24)));
            let steps = story["steps"].as_array().expect("a list");
            let draws = steps.iter().filter(|step| step["draws"] == true).count();
            assert_eq!(draws, 24, "a step for each token: {story}");
            off.push((client - sum(story)).abs());
        }
    }
    // What lies outside is the way through two sockets; a busy machine may hold up either end of one.
    off.sort_by(f64::total_cmp);
    assert!(off[0] < 1.0 && off[off.len() / 2] < 4.0 && off[off.len() - 1] < 60.0, "{off:?} ms");
}

#[test]
fn waits_are_as_long_as_they_were_and_name_what_was_short() {
    let server = Server::start(&FAKE);
    let http = connected(&server);
    let first = std::thread::spawn({
        let (url, http) = (server.url.clone(), http.clone());
        move || ask(&http, &url, &body(1, 10, 40), Some("one-client"))
    });
    std::thread::sleep(Duration::from_millis(60));
    let second = ask(&http, &server.url, &body(2, 10, 10), Some("one-client"));
    let first = first.join().expect("no panic");
    // The client's own name stands in the header; the newest of that name is told, and that there is
    // another, which is found by the id in its body.
    assert_eq!(second.id, "one-client");
    let (_, answer) = explain(&server, "one-client");
    assert_eq!(
        (&answer["client_id"], &answer["others_of_this_client_id"]),
        (&json!("one-client"), &json!(1))
    );
    let told = parts(stories(&answer)[0]);
    let sum_of =
        |kind: &str| told.iter().filter(|part| part.0 == kind).map(|part| part.2).sum::<f64>();
    let queued = told.iter().find(|part| part.0 == "queued").unwrap_or_else(|| panic!("{told:?}"));
    assert_eq!(queued.1, "slot", "{told:?}");
    // Forty steps of the first, less what had passed; ten of its own.
    assert!((90.0..200.0).contains(&(queued.2 + sum_of("ahead"))), "{told:?}");
    assert!((49.0..90.0).contains(&(sum_of("prefill") + sum_of("decode"))), "{told:?}");
    let (status, answer) = explain(&server, &first.body_id);
    assert_eq!((status, &answer["door"]), (200, &json!("completions")));
    let told = parts(stories(&answer)[0]);
    assert!(told.iter().all(|part| part.0 != "queued"), "{told:?}");
    // By the number of its generation, as other stories name it.
    let number = answer["generations"][0]["generation"].as_u64().expect("a number");
    let (_, again) = explain(&server, &number.to_string());
    assert_eq!(again["id"], answer["id"]);
}

#[test]
fn one_that_left_and_a_request_under_way_are_told() {
    let server = Server::start(&FAKE);
    let http = connected(&server);
    // Before steps were seen nobody is sent away for a forecast, so it runs until its client has waited.
    let (status, _) = server.post_within(150, &body(3, 10, 400));
    assert_eq!(status, 504);
    let (_, newest) = explain(&server, "2");
    let story = stories(&newest)[0];
    assert_eq!(story["ended_by"], "deadline", "{newest}");
    assert!((140.0..250.0).contains(&sum(story)), "{newest}");
    let url = server.url.clone();
    let running = std::thread::spawn({
        let http = http.clone();
        move || ask(&http, &url, &body(1, 10, 120), Some("running"))
    });
    std::thread::sleep(Duration::from_millis(100));
    let (_, answer) = explain(&server, "running");
    assert!(answer["replied_ms"].is_null(), "{answer}");
    let story = stories(&answer)[0];
    assert_eq!(story["state"], "running");
    assert!((60.0..400.0).contains(&sum(story)), "{story}");
    running.join().expect("no panic");
}

fn run(server: &Server, environment: &[(&str, &str)], args: &[&str]) -> (bool, String) {
    let mut command = Command::new(program());
    command
        .arg("explain")
        .args(args)
        .args(["--url", &server.url])
        .env_remove("TOKENMILL_ADMIN_KEY");
    let output = common::ends(command.envs(environment.iter().copied()));
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).expect("UTF-8"))
}

#[test]
fn the_command_prints_a_page_and_says_what_to_do() {
    let server = Server::start(&FAKE);
    let http = connected(&server);
    let asked = ask(&http, &server.url, &body(5, 10, 30), None);
    let (found, page) = run(&server, &[], &[&asked.id]);
    assert!(found, "{page}");
    for piece in
        [&asked.id[..], "first token after", "  |", "from ms", "prefill", "decode", "slowest"]
    {
        assert!(page.contains(piece), "{piece:?} is not in\n{page}");
    }
    let (_, all) = run(&server, &[], &[&asked.id, "--steps"]);
    assert!(all.lines().count() > page.lines().count() + 20, "{all}");
    let (_, json) = run(&server, &[], &[&asked.id, "--json"]);
    let json: Value = serde_json::from_str(&json).expect("one object");
    assert_eq!(json["id"], *asked.id);
    let (found, why) = run(&server, &[], &["0123456789abcdef0123456789abcdef"]);
    assert!(!found && why.contains("x-request-id") && why.contains("s back"), "{why}");
    let gone = ["explain", "x", "--url", "http://127.0.0.1:9"];
    let output = common::ends(Command::new(program()).args(gone));
    let why = String::from_utf8(output.stderr).expect("UTF-8");
    assert!(!output.status.success() && why.contains("--url names the server"), "{why}");
}

#[test]
fn strangers_are_kept_out() {
    let server = Server::start_in(&[("TOKENMILL_ADMIN_KEY", "sesame")], &FAKE);
    let http = connected(&server);
    let asked = ask(&http, &server.url, &body(1, 10, 2), None);
    let (status, refusal) = explain(&server, &asked.id);
    assert_eq!((status, &refusal["error"]["code"]), (403, &json!("admin_only")));
    let (status, _) = explain(&server, "no/such/thing");
    assert_eq!(status, 403, "what is there is no stranger's business");
    let (found, why) = run(&server, &[], &[&asked.id]);
    assert!(!found && why.contains("TOKENMILL_ADMIN_KEY"), "{why}");
    let (found, page) = run(&server, &[("TOKENMILL_ADMIN_KEY", "sesame")], &[&asked.id]);
    assert!(found, "{page}");
    let open = Server::start(&FAKE);
    let http = connected(&open);
    let asked = ask(&http, &open.url, &body(1, 10, 2), None);
    let door = format!("{}/admin/requests/{}", open.url, asked.id);
    let forwarded = http.get(&door).header("x-forwarded-for", "10.0.0.9").send().expect("answers");
    let rebound = http.get(&door).header("host", "evil.example").send().expect("answers");
    let plain = http.get(&door).send().expect("answers");
    let statuses = [forwarded.status(), rebound.status(), plain.status()].map(|s| s.as_u16());
    assert_eq!(statuses, [403, 403, 200]);
    let nothing = http.get(format!("{}/admin/nothing", open.url)).send().expect("answers");
    assert_eq!(nothing.status(), 404);
}

#[test]
fn without_a_journal_it_says_so() {
    let server = Server::start(&[&FAKE[..], &["--journal-bytes", "0"]].concat());
    let http = connected(&server);
    let asked = ask(&http, &server.url, &body(1, 10, 2), None);
    let (found, page) = run(&server, &[], &[&asked.id]);
    assert!(found && page.contains("no journal is kept here"), "{page}");
}
