//! Tokenizer, chat templates, incremental text, stop strings, prompt hashes.
//!
//! Everything here is a pure function of a model folder and its arguments; nothing knows HTTP.
//! Invariants: text handed out is valid UTF-8 and never ends inside a character; the pieces of a
//! [`Detokenizer`] concatenate to the whole; text inside a chat message never becomes a control
//! token.

mod chat_template;
mod detokenize;
mod folder;
mod jinja;
mod prompt_hash;
mod protect;
mod stop;
mod token_bytes;
mod tokenizer;

pub use chat_template::{ChatMessage, ChatTemplate, Role, TemplateError, TemplateOptions};
pub use detokenize::{Detokenizer, Start};
pub use folder::{EndTokens, FolderError, GenerationConfig, TextFolder};
pub use prompt_hash::hash_prompt;
pub use stop::{StopMatch, StopMatcher, StopStrings};
pub use tokenizer::{EncodeError, LoadError, Tokenizer};
