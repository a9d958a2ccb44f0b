//! Token ids to text, a token at a time.
//!
//! Each token has a fixed byte string ([`crate::token_bytes`]); this file joins them and cuts at
//! character borders. Constant time per token. Invariants: a piece is valid UTF-8 and never ends
//! inside a character that later bytes could complete; the pieces and the rest concatenate to what
//! decoding the whole sequence gives, with U+FFFD for each maximal invalid sequence.

use crate::Tokenizer;
use ids::TokenId;
use std::sync::Arc;

/// Where the first token stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// At the start of a text; tokenizers that put a space before a text take it off again.
    Text,
    /// After other tokens (a prompt); a leading space is part of the text.
    Continuation,
}

/// Turns tokens into text as they come.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    /// Bytes of a character that is not complete yet; at most 3.
    partial: Vec<u8>,
    at_text_start: bool,
    skip_special: bool,
}

impl Detokenizer {
    /// A detokenizer before its first token. `skip_special` leaves special tokens out of the text.
    #[must_use]
    pub fn new(tokenizer: Arc<Tokenizer>, start: Start, skip_special: bool) -> Self {
        Self {
            tokenizer,
            partial: Vec::with_capacity(4),
            at_text_start: start == Start::Text,
            skip_special,
        }
    }

    /// Appends to `out` the text that `token` completes.
    pub fn push(&mut self, token: TokenId, out: &mut String) {
        if self.skip_special && self.tokenizer.is_special(token) {
            return;
        }
        let table = self.tokenizer.token_bytes();
        let mut bytes = table.get(token);
        if self.at_text_start && !bytes.is_empty() {
            self.at_text_start = false;
            bytes = table.at_text_start(bytes);
        }
        if self.partial.is_empty() {
            let rest = push_complete(bytes, out);
            self.partial.extend_from_slice(rest);
        } else {
            let mut joined = std::mem::take(&mut self.partial);
            joined.extend_from_slice(bytes);
            let rest = push_complete(&joined, out).len();
            joined.drain(..joined.len() - rest);
            self.partial = joined;
        }
    }

    /// The end: an incomplete character becomes U+FFFD.
    pub fn finish(&mut self, out: &mut String) {
        if !self.partial.is_empty() {
            out.push(char::REPLACEMENT_CHARACTER);
            self.partial.clear();
        }
    }
}

/// Appends the characters of `bytes`, U+FFFD for what can be none, and returns the incomplete
/// character at the end.
fn push_complete<'a>(bytes: &'a [u8], out: &mut String) -> &'a [u8] {
    let mut chunks = bytes.utf8_chunks().peekable();
    while let Some(chunk) = chunks.next() {
        out.push_str(chunk.valid());
        let invalid = chunk.invalid();
        if invalid.is_empty() {
            continue;
        }
        let at_end = chunks.peek().is_none();
        let can_grow =
            at_end && std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
        if can_grow {
            return invalid;
        }
        out.push(char::REPLACEMENT_CHARACTER);
    }
    &[]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bytes_in_any_pieces_decode_as_the_whole(
            bytes in prop::collection::vec(prop_oneof![any::<u8>(), 0xC0_u8..=0xF5, 0x80_u8..=0xBF], 0..40),
            size in 1_usize..5,
        ) {
            let mut out = String::new();
            let mut partial = Vec::new();
            for piece in bytes.chunks(size) {
                partial.extend_from_slice(piece);
                let rest = push_complete(&partial, &mut out).to_vec();
                prop_assert!(rest.len() <= 3);
                partial = rest;
            }
            if !partial.is_empty() {
                out.push(char::REPLACEMENT_CHARACTER);
            }
            prop_assert_eq!(out, String::from_utf8_lossy(&bytes));
        }
    }
}
