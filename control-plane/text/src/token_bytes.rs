//! The byte string each token stands for, worked out once from a tokenizer's decoder.
//!
//! Two designs cover the models this engine serves: byte-level BPE, where every character of a
//! token names a byte, and SentencePiece style, where a marker stands for a space and `<0xAB>` for
//! a byte. Where a tokenizer has none its tokens are words, with a space between them. Any other decoder
//! is refused at load, not approximated. Bytes of adjacent byte tokens
//! are joined before they are read as UTF-8, so one broken character never spoils its neighbours.

use crate::LoadError;
use ids::TokenId;
use serde::Deserialize;

/// Bytes of all tokens, one after another.
#[derive(Debug)]
pub(crate) struct TokenBytes {
    bytes: Vec<u8>,
    /// `bytes[ends[i - 1]..ends[i]]` belongs to token `i`.
    ends: Vec<u32>,
    leading: LeadingSpace,
    longest: usize,
}

/// What happens to spaces at the start of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LeadingSpace {
    Keep,
    /// Up to this many are taken off.
    Strip(usize),
    /// Every one in the first token is taken off.
    StripFromToken,
}

/// The `decoder` of a tokenizer.json, as far as it is supported.
#[derive(Debug, Deserialize)]
#[serde(tag = "type")]
enum DecoderSpec {
    ByteLevel,
    Sequence { decoders: Vec<DecoderSpec> },
    Replace { pattern: ReplacePattern, content: String },
    ByteFallback,
    Fuse,
    Strip { content: char, start: usize, stop: usize },
    Metaspace { replacement: char, prepend_scheme: Option<String> },
}

#[derive(Debug, Deserialize)]
enum ReplacePattern {
    String(String),
}

/// The decoder's steps in the order in which a token passes through them.
#[derive(Debug, Default)]
struct Steps {
    byte_level: bool,
    byte_fallback: bool,
    /// Whether each token begins with a space, which the first of a text loses.
    spaced: bool,
    replace: Vec<(String, String)>,
    leading: Option<LeadingSpace>,
}

impl Steps {
    fn read(spec: &DecoderSpec, steps: &mut Self) -> Result<(), LoadError> {
        match spec {
            DecoderSpec::ByteLevel => steps.byte_level = true,
            DecoderSpec::Sequence { decoders } => {
                for decoder in decoders {
                    Self::read(decoder, steps)?;
                }
            }
            DecoderSpec::Replace { pattern: ReplacePattern::String(from), content } => {
                steps.replace.push((from.clone(), content.clone()));
            }
            DecoderSpec::ByteFallback => steps.byte_fallback = true,
            DecoderSpec::Fuse => {}
            DecoderSpec::Strip { content: ' ', start, stop: 0 } => {
                steps.leading = Some(LeadingSpace::Strip(*start));
            }
            DecoderSpec::Strip { .. } => {
                return Err(LoadError::Decoder("Strip of anything but leading spaces".to_owned()));
            }
            DecoderSpec::Metaspace { replacement, prepend_scheme } => {
                steps.replace.push((replacement.to_string(), " ".to_owned()));
                if prepend_scheme.as_deref() != Some("never") {
                    steps.leading = Some(LeadingSpace::StripFromToken);
                }
            }
        }
        Ok(())
    }

    fn bytes_of(&self, token: &str) -> Vec<u8> {
        if self.byte_level {
            // A token with a character outside of the alphabet is an added one: its text, as it is.
            let mapped: Option<Vec<u8>> = token.chars().map(byte_of_char).collect();
            return mapped.unwrap_or_else(|| token.as_bytes().to_vec());
        }
        if self.byte_fallback
            && let Some(byte) = byte_token(token)
        {
            return vec![byte];
        }
        let mut text = if self.spaced { format!(" {token}") } else { token.to_owned() };
        for (from, to) in &self.replace {
            text = text.replace(from, to);
        }
        text.into_bytes()
    }
}

impl TokenBytes {
    /// Works out the table. `decoder` is the tokenizer's; `tokens` are those of ids 0, 1, ….
    pub(crate) fn new<'a>(
        decoder: &serde_json::Value,
        tokens: impl Iterator<Item = Option<&'a str>>,
    ) -> Result<Self, LoadError> {
        let spec = Option::<DecoderSpec>::deserialize(decoder)
            .map_err(|error| LoadError::Decoder(error.to_string()))?;
        let mut steps = Steps::default();
        match spec {
            Some(spec) => Steps::read(&spec, &mut steps)?,
            None => (steps.spaced, steps.leading) = (true, Some(LeadingSpace::Strip(1))),
        }
        let mut table = Self {
            bytes: Vec::new(),
            ends: Vec::new(),
            leading: steps.leading.unwrap_or(LeadingSpace::Keep),
            longest: 1,
        };
        for token in tokens {
            let bytes = token.map(|token| steps.bytes_of(token)).unwrap_or_default();
            table.longest = table.longest.max(bytes.len());
            table.bytes.extend_from_slice(&bytes);
            let end =
                u32::try_from(table.bytes.len()).map_err(|_| LoadError::VocabularyTooLarge)?;
            table.ends.push(end);
        }
        Ok(table)
    }

    /// The token's bytes; none where the id has no token (models pad their vocabulary).
    pub(crate) fn get(&self, token: TokenId) -> &[u8] {
        let index = token.index();
        let Some(&end) = self.ends.get(index) else { return &[] };
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.bytes[start as usize..end as usize]
    }

    /// The bytes of the first token of a text.
    pub(crate) fn at_text_start<'a>(&self, bytes: &'a [u8]) -> &'a [u8] {
        let limit = match self.leading {
            LeadingSpace::Keep => 0,
            LeadingSpace::Strip(limit) => limit,
            LeadingSpace::StripFromToken => usize::MAX,
        };
        let spaces = bytes.iter().take_while(|byte| **byte == b' ').count();
        &bytes[spaces.min(limit)..]
    }

    /// Length in bytes of the longest token.
    pub(crate) fn longest(&self) -> usize {
        self.longest
    }
}

/// `<0xAB>` as its byte.
fn byte_token(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() == 2 { u8::from_str_radix(hex, 16).ok() } else { None }
}

/// The byte that a character of the byte-level alphabet stands for: printable Latin-1 characters
/// stand for themselves, the 68 other bytes are numbered from U+0100 (GPT-2's `bytes_to_unicode`).
fn byte_of_char(c: char) -> Option<u8> {
    let code = u32::from(c);
    match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => u8::try_from(code).ok(),
        0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        0x121..=0x142 => u8::try_from(code - 0x121 + 0x7F).ok(),
        0x143 => Some(0xAD),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_byte_alphabet_covers_every_byte_once() {
        let mut seen = [0_u32; 256];
        for code in 0..0x200 {
            if let Some(byte) = char::from_u32(code).and_then(byte_of_char) {
                seen[usize::from(byte)] += 1;
            }
        }
        assert_eq!(seen, [1; 256]);
        assert_eq!(byte_of_char('Ġ'), Some(b' '));
        assert_eq!(byte_of_char('Ċ'), Some(b'\n'));
    }

    #[test]
    fn sentencepiece_decoders_give_spaces_and_bytes() {
        let decoder = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
        let tokens = ["▁▁a", "<0xE4>", "<0xE>", "b"].map(Some);
        let table = TokenBytes::new(&decoder, tokens.into_iter()).expect("supported");
        assert_eq!(table.get(TokenId(0)), b"  a");
        assert_eq!(table.at_text_start(table.get(TokenId(0))), b" a");
        assert_eq!(table.get(TokenId(1)), [0xE4]);
        assert_eq!(table.get(TokenId(2)), b"<0xE>");
        assert_eq!(table.get(TokenId(9)), b"");
    }

    #[test]
    fn without_a_decoder_tokens_are_words() {
        let tokens = ["a", "word", " "].map(Some);
        let table = TokenBytes::new(&json!(null), tokens.into_iter()).expect("supported");
        assert_eq!(table.get(TokenId(1)), b" word");
        assert_eq!(table.at_text_start(table.get(TokenId(1))), b"word");
        assert_eq!(table.at_text_start(table.get(TokenId(2))), b" ");
    }

    #[test]
    fn an_unknown_decoder_is_refused() {
        for decoder in [
            json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
            json!({"type": "Strip", "content": " ", "start": 0, "stop": 1}),
        ] {
            let result = TokenBytes::new(&decoder, std::iter::empty());
            assert!(matches!(result, Err(LoadError::Decoder(_))), "{decoder}");
        }
    }
}
