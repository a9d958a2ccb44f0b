//! `tokenmill explain`: where one request's time went, asked of the server that answered it.
//!
//! It fetches and prints. Invariant: what the server refuses is passed on in the server's words, with
//! what to do.

mod page;

use crate::cli::ExplainArgs;
use crate::out::{say, say_part};
use anyhow::{Context, Result, anyhow, bail};
use page::Answer;
use reqwest::Url;
use serde_json::Value;
use std::time::Duration;

/// How long a server may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// Asks and prints.
pub(crate) fn run(args: &ExplainArgs) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new().context("start the runtime")?;
    let answer = runtime.block_on(ask(args))?;
    if args.json {
        return say!("{answer}");
    }
    let answer: Answer = serde_json::from_value(answer).with_context(|| {
        format!("{} answers in another form; --json prints it, or use its own version", args.url)
    })?;
    say_part!("{}", page::write(&answer, args.steps))
}

async fn ask(args: &ExplainArgs) -> Result<Value> {
    let url = door(&args.url, &args.request)?;
    let client = reqwest::Client::builder().timeout(PATIENCE).build().context("set up HTTP")?;
    let mut request = client.get(url);
    if let Some(key) = std::env::var("TOKENMILL_ADMIN_KEY").ok().filter(|key| !key.is_empty()) {
        request = request.bearer_auth(key);
    }
    let response = request.send().await.with_context(|| {
        format!("reach {}; --url names the server that answered the request", args.url)
    })?;
    let status = response.status();
    let text = response.text().await.with_context(|| format!("read what {} says", args.url))?;
    let answer: Option<Value> = serde_json::from_str(&text).ok();
    match answer {
        Some(answer) if status.is_success() => Ok(answer),
        Some(answer) if answer["error"]["code"] != "not_found" => {
            let message = answer["error"]["message"].as_str();
            Err(anyhow!("{}", message.map_or(text, str::to_owned)))
        }
        _ => bail!("{} is no Tokenmill server that explains requests ({status})", args.url),
    }
}

/// The admin door of a request.
fn door(url: &str, request: &str) -> Result<Url> {
    let mut door = Url::parse(url)
        .with_context(|| format!("{url:?} is no URL; one looks like http://127.0.0.1:8000"))?;
    door.path_segments_mut()
        .map_err(|()| {
            anyhow!("{url:?} is no URL of a server; one looks like http://127.0.0.1:8000")
        })?
        .pop_if_empty()
        .extend(["admin", "requests", request]);
    Ok(door)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_door_is_below_the_url_and_an_id_is_one_segment_of_it() {
        let at = |url, request| door(url, request).map(String::from).ok();
        let root = "http://127.0.0.1:8000/admin/requests/";
        assert_eq!(at("http://127.0.0.1:8000", "ab"), Some(format!("{root}ab")));
        assert_eq!(at("http://127.0.0.1:8000/", "a/b c"), Some(format!("{root}a%2Fb%20c")));
        assert_eq!(at("127.0.0.1", "ab"), None);
        assert_eq!(at("mailto:me", "ab"), None);
    }
}
