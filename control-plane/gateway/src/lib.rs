//! The HTTP gateway: OpenAI-compatible doors over an engine handle.
//!
//! Invariant: a request that reaches the engine has passed every check of this crate; nothing a
//! client sends is an engine error.

pub mod engine;
