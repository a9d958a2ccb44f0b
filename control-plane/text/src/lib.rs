//! Text to tokens and back: tokenizer, chat templates, incremental detokenising, stop strings.
//!
//! No HTTP and no engine. Invariants: text inside a client's message never becomes a control
//! token; text handed out never ends inside a character.

mod chat;
mod detokenize;
mod stop;
mod template;
mod tokenizer;

pub use chat::{ChatPrompt, EncodeChatError};
pub use detokenize::Detokenizer;
pub use stop::{StopMatch, StopMatcher};
pub use template::{ChatTemplate, TemplateError};
pub use tokenizer::{LoadError, Tokenizer};
