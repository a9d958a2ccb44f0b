//! `tokenmill chat`: a conversation with a running server, streamed.
//!
//! Ctrl-C stops the answer, from the moment the question is sent, and keeps what was said; Ctrl-D
//! (or `/exit`) leaves. It holds the conversation and nothing else. Invariant: a turn that brought no
//! answer leaves the conversation as it was.

use crate::cli::ChatArgs;
use crate::out::{Closed, say, say_part};
use anyhow::{Context, Result};
use load::Client;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::signal::unix::{Signal, SignalKind, signal};

const HELP: &str = "\
/clear  start over
/exit   leave (so does Ctrl-D)
/help   this list
Ctrl-C stops an answer and keeps what was said.";

/// Runs the conversation until the input ends.
pub(crate) fn run(args: ChatArgs) -> Result<()> {
    tokio::runtime::Runtime::new().context("start the runtime")?.block_on(talk(args))
}

async fn talk(args: ChatArgs) -> Result<()> {
    // One listener for the whole conversation: one made anew would miss what came before it.
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for Ctrl-C")?;
    let connected = tokio::select! {
        connected = Client::connect(&args.url, args.model.clone()) => connected,
        // A server that never answers is left as any command is.
        _ = interrupt.recv() => return Ok(()),
    };
    let client = connected
        .with_context(|| format!("reach {}; start a server with `tokenmill serve`", args.url))?;
    say!(
        "{} at {}. Ctrl-C stops an answer, Ctrl-D leaves, /help lists commands.",
        client.model(),
        args.url
    )?;
    let opening: Vec<Value> =
        args.system.iter().map(|text| json!({"role": "system", "content": text})).collect();
    let mut messages = opening.clone();
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    loop {
        say_part!("> ")?;
        let line = tokio::select! {
            line = lines.next_line() => line.context("read standard input")?,
            // At the prompt there is no answer to stop.
            _ = interrupt.recv() => { say!("")?; continue }
        };
        let Some(line) = line else { break };
        match line.trim() {
            "" => continue,
            "/exit" => break,
            "/help" => {
                say!("{HELP}")?;
                continue;
            }
            "/clear" => {
                messages.clone_from(&opening);
                continue;
            }
            said => messages.push(json!({"role": "user", "content": said})),
        }
        match answer(&client, &args, &messages, &mut interrupt).await {
            Ok(text) if !text.is_empty() => {
                messages.push(json!({"role": "assistant", "content": text}));
            }
            Ok(_) => {
                messages.pop();
            }
            Err(error) if error.is::<Closed>() => return Err(error),
            Err(error) => {
                messages.pop();
                eprintln!("{error:#}");
            }
        }
    }
    say!("")?;
    Ok(())
}

/// Streams one answer; what arrived before Ctrl-C is the answer.
async fn answer(
    client: &Client,
    args: &ChatArgs,
    messages: &[Value],
    interrupt: &mut Signal,
) -> Result<String> {
    let mut body = json!({
        "model": client.model(), "messages": messages, "stream": true,
        "max_tokens": args.max_tokens,
    });
    if let Some(temperature) = args.temperature {
        body["temperature"] = temperature.into();
    }
    let mut text = String::new();
    // Dropping the request or its stream closes the connection, which aborts the generation.
    let mut events = tokio::select! {
        events = client.post("/v1/chat/completions", &body) => events?,
        _ = interrupt.recv() => { say!("[stopped]")?; return Ok(text) }
    };
    loop {
        let event = tokio::select! {
            event = events.next(client) => event?,
            _ = interrupt.recv() => { say_part!(" [stopped]")?; break }
        };
        let Some(event) = event else { break };
        let choice = &event["choices"][0];
        if let Some(piece) = choice["delta"]["content"].as_str() {
            text.push_str(piece);
            say_part!("{piece}")?;
        }
        if choice["finish_reason"] == "length" {
            say_part!(" [cut at --max-tokens or the context's end]")?;
        }
    }
    say!("")?;
    Ok(text)
}
