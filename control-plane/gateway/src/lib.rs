//! The HTTP gateway: OpenAI-compatible doors over an engine handle.
