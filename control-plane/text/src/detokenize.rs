//! Tokens to text, one at a time.
//!
//! A token may hold part of a character, and some decoders join words depending on what came
//! before, so text is the difference between two decodings of a short window. Text that ends inside
//! a character waits for the next token. Invariant: the pieces joined are the decoding of the whole.

use crate::Tokenizer;
use ids::TokenId;

/// A character has at most four bytes, so after this many tokens without a whole one the bytes are
/// no character at all and are given out as replacement characters.
const MAX_HELD: usize = 5;

/// Incremental decoder of one sequence.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    skip_special: bool,
    /// The window: tokens already given out that the next ones may join with, then those held back.
    window: Vec<TokenId>,
    /// How many of the window are given out.
    given: usize,
}

impl Detokenizer {
    /// For one sequence; special tokens give no text when `skip_special`.
    #[must_use]
    pub const fn new(skip_special: bool) -> Self {
        Self { skip_special, window: Vec::new(), given: 0 }
    }

    /// The text that `token` completes; empty while a character is incomplete.
    pub fn push(&mut self, tokenizer: &Tokenizer, token: TokenId) -> String {
        self.window.push(token);
        let before = tokenizer.decode(&self.window[..self.given], self.skip_special);
        let after = tokenizer.decode(&self.window, self.skip_special);
        let held = self.window.len() - self.given;
        if after.ends_with('\u{FFFD}') && held < MAX_HELD {
            return String::new();
        }
        let text = after.get(before.len()..).unwrap_or_default().to_owned();
        // Keep what was just given out as context; everything older is settled.
        self.window.drain(..self.given);
        self.given = self.window.len();
        text
    }

    /// The text of tokens still held back when the sequence ends.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> String {
        let before = tokenizer.decode(&self.window[..self.given], self.skip_special);
        let after = tokenizer.decode(&self.window, self.skip_special);
        self.given = self.window.len();
        after.get(before.len()..).unwrap_or_default().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests_support::byte_level;

    #[test]
    fn pieces_joined_are_the_whole_and_no_piece_splits_a_character() {
        let tokenizer = byte_level();
        for text in
            ["plain", "naïve café", "日本語のテキスト", "🦀🦀 👩‍👩‍👧", "a\u{301}b", "", " x  y "]
        {
            let tokens = tokenizer.encode_plain(text).expect("encodes");
            let mut detokenizer = Detokenizer::new(true);
            let mut joined = String::new();
            for token in &tokens {
                let piece = detokenizer.push(&tokenizer, *token);
                assert!(!piece.contains('\u{FFFD}'), "{piece:?} of {text:?}");
                joined += &piece;
            }
            joined += &detokenizer.finish(&tokenizer);
            assert_eq!(joined, text);
        }
    }

    #[test]
    fn bytes_that_are_no_character_do_not_hold_text_for_ever() {
        let tokenizer = byte_level();
        let crab = tokenizer.encode_plain("🦀").expect("encodes");
        let mut detokenizer = Detokenizer::new(true);
        let mut text = String::new();
        for _ in 0..20 {
            text += &detokenizer.push(&tokenizer, crab[0]);
        }
        assert!(!text.is_empty());
        assert!(detokenizer.window.len() <= 2 * MAX_HELD, "the window stays short");
    }
}
