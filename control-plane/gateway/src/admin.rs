//! Doors below `/admin`: for those who run the server, closed to everybody else.
//!
//! With `TOKENMILL_ADMIN_KEY` set, whoever brings the key is let in. Without, peers on this machine
//! are, unless something says that they speak for others or under another host's name: a proxy, or a
//! browser that was led here. Invariant: nothing below `/admin` answers, not even 404, before [`guard`]
//! has let the request pass.

use crate::book::{Visit, bare};
use crate::error::ApiError;
use crate::state::{AppState, Gateway};
use axum::extract::{Path, Request, State};
use axum::http::header::{AUTHORIZATION, FORWARDED, HOST, ORIGIN, VIA};
use axum::http::{HeaderMap, HeaderName, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Who is at the other end of a request's connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer(pub(crate) SocketAddr);

/// The doors.
pub(crate) fn routes() -> Router<AppState> {
    Router::new().route("/requests/{*id}", get(explain))
}

/// Lets in whoever may come in.
pub(crate) async fn guard(
    State(gateway): State<AppState>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let peer = request.extensions().get::<Peer>().map(|peer| peer.0);
    admit(gateway.admin_key.as_deref(), peer, request.headers()).map_err(|why| {
        let message = format!("{why}; docs/reference/cli.md says more");
        ApiError::new(StatusCode::FORBIDDEN, "admin_only", message)
    })?;
    Ok(next.run(request).await)
}

fn admit(
    key: Option<&str>,
    peer: Option<SocketAddr>,
    headers: &HeaderMap,
) -> Result<(), &'static str> {
    if let Some(key) = key {
        let given = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let given = given.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
        return if same(given.as_bytes(), key.as_bytes()) {
            Ok(())
        } else {
            Err("send the server's TOKENMILL_ADMIN_KEY as `Authorization: Bearer KEY`")
        };
    }
    if !peer.is_some_and(|peer| peer.ip().to_canonical().is_loopback()) {
        return Err("this door is open to the server's own machine alone; start the server with \
                    TOKENMILL_ADMIN_KEY set to come from elsewhere");
    }
    let forwards: [HeaderName; 5] = [
        FORWARDED,
        VIA,
        ORIGIN,
        HeaderName::from_static("x-forwarded-for"),
        HeaderName::from_static("x-real-ip"),
    ];
    if forwards.iter().any(|name| headers.contains_key(name)) || !names_this_machine(headers) {
        return Err("this came through a proxy or a browser; start the server with \
                    TOKENMILL_ADMIN_KEY set to come so");
    }
    Ok(())
}

/// Whether the request was meant for this machine by a name of its own.
fn names_this_machine(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(HOST) else { return true };
    let host = host.to_str().unwrap_or_default();
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost")
        || bare.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Compares without telling by time how much of it is right.
fn same(given: &[u8], key: &[u8]) -> bool {
    let differs = given.iter().zip(key).fold(0, |differs, (a, b)| differs | (a ^ b));
    given.len() == key.len() && differs == 0
}

/// Where a request's time went.
async fn explain(
    State(gateway): State<AppState>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let Some((visit, others)) = gateway.book.find(&name) else {
        return Err(unknown(&gateway, &name));
    };
    let stories = gateway.engine.explain(&visit.generations, visit.received, visit.replied).await;
    let generations: Vec<Value> = stories
        .into_iter()
        .zip(&visit.generations)
        .map(|(story, number)| match story {
            Ok(story) => json!({ "generation": number.0, "story": with_ends(story, &visit) }),
            Err(error) => json!({ "generation": number.0, "error": error.to_string() }),
        })
        .collect();
    Ok(Json(json!({
        "id": visit.id,
        "client_id": visit.client_id,
        "others_of_this_client_id": others,
        "door": visit.door,
        "replied_ms": visit.replied.map(|at| ms(at.saturating_duration_since(visit.received))),
        "generations": generations,
    })))
}

/// Puts what the gateway took before and behind the engine's parts.
fn with_ends(mut story: Value, visit: &Visit) -> Value {
    let since = |at: Instant| ms(at.saturating_duration_since(visit.received));
    let part = |part: &str, from: f64, to: f64| json!({ "part": part, "from_ms": from, "ms": to - from, "steps": 0 });
    if let Some(parts) = story["parts"].as_array_mut() {
        let begins = parts.first().and_then(|first| first["from_ms"].as_f64());
        let ends =
            parts.last().and_then(|last| Some(last["from_ms"].as_f64()? + last["ms"].as_f64()?));
        let arrival = begins.unwrap_or_else(|| since(visit.submitted));
        parts.insert(0, part("gateway", 0.0, arrival));
        if let Some(replied) = visit.replied.map(since) {
            let end = ends.unwrap_or(arrival);
            parts.push(part("reply", end, replied.max(end)));
        }
    }
    story
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// 404 that says what ids look like and how far back they are known.
fn unknown(gateway: &Gateway, name: &str) -> ApiError {
    let (held, oldest) = gateway.book.reach();
    let back = oldest.map_or(0.0, |at| at.elapsed().as_secs_f64());
    let message = if gateway.gave_out(bare(name)) {
        format!(
            "request {name:?} is too long ago, or generated nothing; the last {held} requests are \
             known, {back:.0} s back"
        )
    } else {
        format!(
            "no request {name:?} came in; give the x-request-id header or the id of a reply, or a \
             generation's number. The last {held} requests are known, {back:.0} s back"
        )
    };
    ApiError::new(StatusCode::NOT_FOUND, "request_unknown", message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    fn headers(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        let line = |(name, value): &(&'static str, &'static str)| {
            (HeaderName::from_static(name), HeaderValue::from_static(value))
        };
        lines.iter().map(line).collect()
    }

    #[test]
    fn only_this_machine_itself_comes_in_without_a_key() {
        let near: Option<SocketAddr> = "127.0.0.1:5".parse().ok();
        let mapped = "[::ffff:127.0.0.1]:5".parse().ok();
        let far = "10.0.0.9:5".parse().ok();
        let own = headers(&[("host", "localhost:8000")]);
        for (peer, lines, passes) in [
            (near, own.clone(), true),
            (mapped, own.clone(), true),
            (near, headers(&[]), true),
            (near, headers(&[("host", "127.0.0.1:8000")]), true),
            (near, headers(&[("host", "[::1]:8000")]), true),
            (near, headers(&[("host", "[::1]")]), true),
            (far, own.clone(), false),
            (None, own.clone(), false),
            (near, headers(&[("host", "rebound.example:8000")]), false),
            (near, headers(&[("host", "localhost"), ("x-forwarded-for", "10.0.0.9")]), false),
            (near, headers(&[("host", "localhost"), ("origin", "http://evil.example")]), false),
            (near, headers(&[("host", "localhost"), ("via", "1.1 proxy")]), false),
        ] {
            assert_eq!(admit(None, peer, &lines).is_ok(), passes, "{peer:?} {lines:?}");
        }
    }

    #[test]
    fn with_a_key_only_the_key_counts() {
        let near: Option<SocketAddr> = "127.0.0.1:5".parse().ok();
        let far = "10.0.0.9:5".parse().ok();
        for (peer, lines, passes) in [
            (near, headers(&[]), false),
            (near, headers(&[("authorization", "Bearer secre")]), false),
            (near, headers(&[("authorization", "Bearer secret!")]), false),
            (near, headers(&[("authorization", "secret")]), false),
            (near, headers(&[("authorization", "Bearer secret")]), true),
            (far, headers(&[("authorization", "Bearer secret"), ("via", "1.1 proxy")]), true),
        ] {
            assert_eq!(admit(Some("secret"), peer, &lines).is_ok(), passes, "{peer:?} {lines:?}");
        }
    }
}
