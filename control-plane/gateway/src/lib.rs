//! The HTTP gateway: OpenAI-compatible doors over an engine handle.
//!
//! A request is read within bounds ([`limits`]), checked in one place (`validate`), submitted
//! through the [`engine::Engine`] trait, and answered whole or as server-sent events. The gateway
//! knows no scheduler. Invariant: a request that reaches the engine has passed every check of this
//! crate; nothing a client sends is an engine error.

mod admin;
mod body;
mod book;
mod chat;
mod choice;
mod completions;
pub mod engine;
mod error;
mod generate;
mod health;
pub mod limits;
mod logprobs;
mod models;
mod request;
mod server;
mod stall;
mod state;
mod stream;
mod tokenize;
mod validate;

pub use error::ApiError;
pub use limits::GatewayLimits;
pub use server::{router, serve};
pub use state::{AppState, Gateway, ServedModel};
pub use validate::{DefaultsError, check_defaults};
