//! A model's tokenizer with what its folder says about special tokens.

use ids::TokenId;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Why a folder's tokenizer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file does not hold what its name says.
    #[error("{path} is not usable: {reason}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// Text to token ids and back. Cheap to share behind an `Arc`.
pub struct Tokenizer {
    /// Special-token text becomes control tokens.
    control: tokenizers::Tokenizer,
    /// Special-token text stays text.
    plain: tokenizers::Tokenizer,
    /// Texts of special tokens, longest first.
    specials: Vec<String>,
}

impl Tokenizer {
    /// Loads `tokenizer.json` of a folder; `None` where there is none.
    ///
    /// # Errors
    /// When the file is there and cannot be used.
    pub fn load(folder: &Path) -> Result<Option<Self>, LoadError> {
        let path = folder.join("tokenizer.json");
        match std::fs::read(&path) {
            Ok(bytes) => Self::from_bytes(&bytes)
                .map(Some)
                .map_err(|reason| LoadError::Invalid { path, reason }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(LoadError::Read { path, source }),
        }
    }

    /// From the content of a `tokenizer.json`.
    ///
    /// # Errors
    /// What the tokenizer library says against it.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        let control = tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| e.to_string())?;
        let mut plain = control.clone();
        plain.set_encode_special_tokens(true);
        let mut specials: Vec<String> = control
            .get_added_tokens_decoder()
            .into_values()
            .filter(|token| token.special && !token.content.is_empty())
            .map(|token| token.content)
            .collect();
        specials.sort_by_key(|text| std::cmp::Reverse(text.len()));
        Ok(Self { control, plain, specials })
    }

    /// Encodes text whose special tokens are meant as such. `add_special` adds what the tokenizer
    /// puts around a sequence (a start token, for many).
    ///
    /// # Errors
    /// What the tokenizer library says against the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, String> {
        encode(&self.control, text, add_special)
    }

    /// Encodes text in which nothing is a control token.
    ///
    /// # Errors
    /// What the tokenizer library says against the text.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<TokenId>, String> {
        encode(&self.plain, text, false)
    }

    /// The text of `tokens`, as far as they are text.
    #[must_use]
    pub fn decode(&self, tokens: &[TokenId], skip_special: bool) -> String {
        let ids: Vec<u32> = tokens.iter().map(|token| token.0).collect();
        // Decoding fails only where a decoder is misconfigured; then there is no text to give.
        self.control.decode(&ids, skip_special).unwrap_or_default()
    }

    /// The piece of the vocabulary, as clients see a single token in log-probabilities.
    #[must_use]
    pub fn piece(&self, token: TokenId) -> String {
        self.decode(&[token], false)
    }

    /// Texts of special tokens, longest first.
    #[must_use]
    pub fn specials(&self) -> &[String] {
        &self.specials
    }

    /// Id of a token by its exact text.
    #[must_use]
    pub fn token_id(&self, text: &str) -> Option<TokenId> {
        self.control.token_to_id(text).map(TokenId)
    }

    /// Entries of the vocabulary, added tokens included.
    #[must_use]
    pub fn vocab(&self) -> usize {
        self.control.get_vocab_size(true)
    }
}

fn encode(
    tokenizer: &tokenizers::Tokenizer,
    text: &str,
    add_special: bool,
) -> Result<Vec<TokenId>, String> {
    let encoding = tokenizer.encode_fast(text, add_special).map_err(|error| error.to_string())?;
    Ok(encoding.get_ids().iter().copied().map(TokenId).collect())
}

/// A string field of a parsed `tokenizer_config.json`, which holds a token as text or as an object.
pub(crate) fn token_text(config: &Value, field: &str) -> Option<String> {
    let value = config.get(field)?;
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer({} entries)", self.vocab())
    }
}

#[cfg(test)]
pub(crate) mod tests_support {
    //! A byte-level tokenizer without merges: every byte is a token, so characters fall apart.

    use super::Tokenizer;
    use serde_json::json;

    /// The printable stand-in that byte-level tokenizers use for a byte.
    fn stand_in(byte: u8) -> char {
        let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        if printable(byte) {
            return char::from(byte);
        }
        let rank = (0..byte).filter(|b| !printable(*b)).count() as u32;
        char::from_u32(256 + rank).expect("a character")
    }

    /// 256 bytes, then `<|bos|>`, `<|user|>` and `<|end|>` as special tokens.
    pub(crate) fn byte_level() -> Tokenizer {
        let vocab: serde_json::Map<String, serde_json::Value> =
            (0..=255_u8).map(|b| (stand_in(b).to_string(), u32::from(b).into())).collect();
        let special = |id: u32, content: &str| {
            json!({"id": id, "content": content, "special": true, "normalized": false,
                   "single_word": false, "lstrip": false, "rstrip": false})
        };
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
            "added_tokens": [special(256, "<|bos|>"), special(257, "<|user|>"), special(258, "<|end|>")],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "post_processor": null,
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "unk_token": null,
                      "continuing_subword_prefix": null, "end_of_word_suffix": null,
                      "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}
        });
        Tokenizer::from_bytes(file.to_string().as_bytes()).expect("a tokenizer")
    }
}
