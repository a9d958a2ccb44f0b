//! `POST /tokenize` and `POST /detokenize`, in vLLM's shapes.
//!
//! A reply is written where its request is checked, off the connection's task where it is long: it
//! is as long as its request.

use crate::error::ApiError;
use crate::state::{AppState, Gateway};
use crate::{body, request, validate};
use axum::body::Body;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, Request};
use axum::response::Response;
use serde::Serialize;

#[derive(Serialize)]
struct Tokenized {
    count: usize,
    max_model_len: u32,
    tokens: Vec<u32>,
    token_strs: Option<Vec<String>>,
}

#[derive(Serialize)]
struct Detokenized {
    prompt: String,
}

/// Text or messages to tokens.
pub(crate) async fn tokenize(
    State(gateway): State<AppState>,
    http: Request<Body>,
) -> Result<Response, ApiError> {
    let bytes = body::read(http, &gateway.limits).await?;
    request::check(&gateway, bytes, tokenized).await.map(respond)
}

/// Tokens to text, special tokens included.
pub(crate) async fn detokenize(
    State(gateway): State<AppState>,
    http: Request<Body>,
) -> Result<Response, ApiError> {
    let bytes = body::read(http, &gateway.limits).await?;
    request::check(&gateway, bytes, detokenized).await.map(respond)
}

fn tokenized(body: &[u8], gateway: &Gateway) -> Result<Vec<u8>, ApiError> {
    let checked = validate::tokenize(body, gateway)?;
    let tokenizer = gateway.tokenizer("prompt")?;
    let names = || checked.tokens.iter().map(|t| tokenizer.token_name(*t).unwrap_or_default());
    Ok(json(&Tokenized {
        count: checked.tokens.len(),
        max_model_len: gateway.engine.limits().max_context.0,
        token_strs: checked.return_strings.then(|| names().collect()),
        tokens: checked.tokens.iter().map(|token| token.0).collect(),
    }))
}

fn detokenized(body: &[u8], gateway: &Gateway) -> Result<Vec<u8>, ApiError> {
    let tokens = validate::detokenize(body, gateway)?;
    let tokenizer = gateway.tokenizer("tokens")?;
    Ok(json(&Detokenized { prompt: tokenizer.decode(&tokens, false) }))
}

fn json(reply: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(reply).expect("replies serialise to memory")
}

fn respond(json: Vec<u8>) -> Response {
    let mut response = Response::new(Body::from(json));
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, json);
    response
}
