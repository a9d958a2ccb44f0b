//! `tokenmill chat`: a conversation with a running server, streamed.
//!
//! Ctrl-C stops the answer and keeps what was said; Ctrl-D (or `/exit`) leaves; `/clear` starts
//! over. It holds the conversation and nothing else.

use crate::cli::ChatArgs;
use anyhow::{Context, Result};
use load::Client;
use serde_json::{Value, json};
use std::io::Write;
use tokio::io::{AsyncBufReadExt, BufReader};

/// Runs the conversation until the input ends.
pub(crate) fn run(args: ChatArgs) -> Result<()> {
    tokio::runtime::Runtime::new().context("start the runtime")?.block_on(talk(args))
}

#[expect(clippy::print_stdout, reason = "the conversation is the command's output")]
async fn talk(args: ChatArgs) -> Result<()> {
    let client = Client::connect(&args.url, args.model.clone())
        .await
        .with_context(|| format!("reach {}; start a server with `tokenmill serve`", args.url))?;
    println!(
        "{} at {}. Ctrl-C stops an answer, Ctrl-D leaves, /clear starts over.",
        client.model(),
        args.url
    );
    let opening: Vec<Value> =
        args.system.iter().map(|text| json!({"role": "system", "content": text})).collect();
    let mut messages = opening.clone();
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    loop {
        print!("> ");
        std::io::stdout().flush()?;
        let line = tokio::select! {
            line = lines.next_line() => line.context("read standard input")?,
            // At the prompt there is no answer to stop.
            _ = tokio::signal::ctrl_c() => { println!(); continue }
        };
        let Some(line) = line else { break };
        match line.trim() {
            "" => continue,
            "/exit" => break,
            "/clear" => {
                messages.clone_from(&opening);
                continue;
            }
            said => messages.push(json!({"role": "user", "content": said})),
        }
        match answer(&client, &args, &messages).await {
            Ok(text) => messages.push(json!({"role": "assistant", "content": text})),
            Err(error) => {
                // The turn did not happen; the conversation goes on without it.
                messages.pop();
                eprintln!("{error:#}");
            }
        }
    }
    println!();
    Ok(())
}

/// Streams one answer; what arrived before Ctrl-C is the answer.
#[expect(clippy::print_stdout, reason = "the conversation is the command's output")]
async fn answer(client: &Client, args: &ChatArgs, messages: &[Value]) -> Result<String> {
    let mut body = json!({
        "model": client.model(), "messages": messages, "stream": true,
        "max_tokens": args.max_tokens,
    });
    if let Some(temperature) = args.temperature {
        body["temperature"] = temperature.into();
    }
    let mut events = client.post("/v1/chat/completions", &body).await?;
    let mut text = String::new();
    loop {
        let event = tokio::select! {
            event = events.next(client) => event?,
            // Dropping the stream closes the connection, which aborts the request.
            _ = tokio::signal::ctrl_c() => { print!(" [stopped]"); break }
        };
        let Some(event) = event else { break };
        if let Some(piece) = event["choices"][0]["delta"]["content"].as_str() {
            text.push_str(piece);
            print!("{piece}");
            std::io::stdout().flush()?;
        }
    }
    println!();
    Ok(text)
}
