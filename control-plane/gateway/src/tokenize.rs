//! `POST /tokenize` and `POST /detokenize`, in vLLM's shapes.

use crate::error::ApiError;
use crate::state::AppState;
use crate::{body, request, validate};
use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use ids::TokenId;
use serde::Serialize;

#[derive(Serialize)]
pub(crate) struct Tokenized {
    count: usize,
    max_model_len: u32,
    tokens: Vec<u32>,
    token_strs: Option<Vec<String>>,
}

#[derive(Serialize)]
pub(crate) struct Detokenized {
    prompt: String,
}

/// Text or messages to tokens.
pub(crate) async fn tokenize(
    State(gateway): State<AppState>,
    http: Request<Body>,
) -> Result<Json<Tokenized>, ApiError> {
    let bytes = body::read(http, &gateway.limits).await?;
    let checked = request::check(&gateway, bytes, validate::tokenize).await?;
    let tokenizer = gateway.tokenizer("prompt")?;
    let name = |token: &TokenId| tokenizer.token_name(*token).unwrap_or_default();
    Ok(Json(Tokenized {
        count: checked.tokens.len(),
        max_model_len: gateway.engine.limits().max_context.0,
        token_strs: checked.return_strings.then(|| checked.tokens.iter().map(name).collect()),
        tokens: checked.tokens.iter().map(|token| token.0).collect(),
    }))
}

/// Tokens to text, special tokens included.
pub(crate) async fn detokenize(
    State(gateway): State<AppState>,
    http: Request<Body>,
) -> Result<Json<Detokenized>, ApiError> {
    let bytes = body::read(http, &gateway.limits).await?;
    let tokens = request::check(&gateway, bytes, validate::detokenize).await?;
    let tokenizer = gateway.tokenizer("tokens")?;
    Ok(Json(Detokenized { prompt: tokenizer.decode(&tokens, false) }))
}
