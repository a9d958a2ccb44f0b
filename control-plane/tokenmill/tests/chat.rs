//! `tokenmill chat` as a person meets it, in a terminal of its own.
//!
//! Against the bundled model for a whole conversation, and against a server that answers by the
//! test's clock, because when Ctrl-C arrives is what is tested. It does not judge the model's words.

mod common;

use common::{Server, program};
use expectrl::process::unix::WaitStatus;
use expectrl::session::OsSession;
use expectrl::{ControlCode, Eof, Expect, Session};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

/// No step of a conversation takes longer, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn chat(url: &str, flags: &[&str]) -> OsSession {
    let mut command = Command::new(program());
    command.args(["chat", "--url", url]).args(flags);
    let mut session = Session::spawn(command).expect("a terminal");
    session.set_expect_timeout(Some(PATIENCE));
    session
}

fn leaves(mut session: OsSession) {
    session.send(ControlCode::EndOfTransmission).expect("sent");
    session.expect(Eof).expect("the end");
    let status = session.get_process().wait().expect("waited for");
    assert!(matches!(status, WaitStatus::Exited(_, 0)), "{status:?}");
}

#[test]
fn a_conversation_with_the_bundled_model() {
    let server = Server::start(&[]);
    let mut session = chat(&server.url, &["--temperature", "0", "--max-tokens", "8"]);
    session.expect("Ctrl-D leaves").expect("a greeting");
    session.expect("> ").expect("a prompt");
    session.send_line("/help").expect("sent");
    session.expect("/clear").expect("the commands");
    session.expect("> ").expect("a prompt");
    let answered = r#"tokenmill_http_replies_total{door="chat_completions"}"#;
    let before = server.metric(answered);
    session.send_line("What does a compiler do?").expect("sent");
    session.expect("\n> ").expect("an answer and a prompt");
    assert_eq!((before, server.metric(answered)), (Some(0.0), Some(1.0)), "replies");
    leaves(session);
}

/// What the scripted server does with a question.
#[derive(Clone, Copy)]
enum Script {
    /// Nothing, until the client leaves.
    Silence,
    /// Pieces without end, until the client leaves.
    Endless,
    /// One word.
    Word,
}

/// A server that follows `scripts`, and tells the body of each question and when its client left.
fn scripted(scripts: Vec<Script>) -> (String, mpsc::Receiver<Value>, mpsc::Receiver<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    let (asked, bodies) = mpsc::channel();
    let (left, leaving) = mpsc::channel();
    let mut scripts = scripts.into_iter();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("a connection");
            let (path, body) = request(&stream);
            if path == "/v1/models" {
                reply(&mut stream, "application/json", r#"{"data":[{"id":"scripted"}]}"#);
                continue;
            }
            asked.send(serde_json::from_slice(&body).expect("JSON")).expect("the test lives");
            match scripts.next().expect("no more questions than scripts") {
                Script::Silence => {
                    let gone = stream.read(&mut [0; 1]);
                    assert!(matches!(gone, Ok(0) | Err(_)), "the client sent more");
                    left.send(()).expect("the test lives");
                }
                Script::Endless => {
                    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n";
                    stream.write_all(head.as_bytes()).expect("the client waits");
                    while stream.write_all(piece("more ").as_bytes()).is_ok() {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    left.send(()).expect("the test lives");
                }
                Script::Word => {
                    let events = piece("done") + "data: [DONE]\n\n";
                    reply(&mut stream, "text/event-stream", &events);
                }
            }
        }
    });
    (url, bodies, leaving)
}

fn piece(text: &str) -> String {
    let event = serde_json::json!({"choices": [{"index": 0, "delta": {"content": text}}]});
    format!("data: {event}\n\n")
}

fn reply(stream: &mut TcpStream, kind: &str, body: &str) {
    let length = body.len();
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
    );
    stream.write_all((head + body).as_bytes()).expect("the client reads");
}

/// Path and body of a request.
fn request(stream: &TcpStream) -> (String, Vec<u8>) {
    let mut reader = BufReader::new(stream);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).expect("a head");
        match line.trim_end() {
            "" => break,
            line => lines.push(line.to_lowercase()),
        }
    }
    let length = lines.iter().find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().expect("a number"))];
    reader.read_exact(&mut body).expect("a whole body");
    (lines[0].split(' ').nth(1).expect("a path").to_owned(), body)
}

fn contents(body: &Value) -> Vec<&str> {
    let messages = body["messages"].as_array().expect("messages");
    messages.iter().filter_map(|message| message["content"].as_str()).collect()
}

#[test]
fn control_c_leaves_while_the_server_does_not_answer() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    let mut session = chat(&url, &[]);
    // Asked for its models, so the command listens for Ctrl-C by now; it gets no reply.
    let (held, _) = listener.accept().expect("a connection");
    session.send(ControlCode::EndOfText).expect("sent");
    session.expect(Eof).expect("the end");
    drop(held);
}

#[test]
fn control_c_stops_an_answer_at_any_time_and_nothing_else() {
    let (url, bodies, left) = scripted(vec![Script::Silence, Script::Endless, Script::Word]);
    let mut session = chat(&url, &["--system", "Be brief."]);
    session.expect("> ").expect("a prompt");
    // At the prompt it only begins a new line.
    session.send(ControlCode::EndOfText).expect("sent");
    session.expect("\n> ").expect("a prompt");

    // Before the answer begins: nothing was said, so the question is forgotten.
    session.send_line("one").expect("sent");
    assert_eq!(contents(&bodies.recv_timeout(PATIENCE).expect("asked")), ["Be brief.", "one"]);
    session.send(ControlCode::EndOfText).expect("sent");
    session.expect("[stopped]").expect("it stops");
    session.expect("> ").expect("a prompt");
    left.recv_timeout(PATIENCE).expect("the connection was closed, which aborts");

    // In the middle: what was said stays.
    session.send_line("two").expect("sent");
    assert_eq!(contents(&bodies.recv_timeout(PATIENCE).expect("asked")), ["Be brief.", "two"]);
    session.expect("more more ").expect("pieces as they come");
    session.send(ControlCode::EndOfText).expect("sent");
    session.expect("[stopped]").expect("it stops");
    session.expect("> ").expect("a prompt");
    left.recv_timeout(PATIENCE).expect("the connection was closed, which aborts");

    session.send_line("three").expect("sent");
    let body = bodies.recv_timeout(PATIENCE).expect("asked");
    let said = contents(&body);
    assert_eq!([&said[..2], &said[3..]].concat(), ["Be brief.", "two", "three"], "{said:?}");
    assert!(said[2].starts_with("more more "), "{said:?}");
    session.expect("done").expect("the answer");
    session.expect("> ").expect("a prompt");
    leaves(session);
}
