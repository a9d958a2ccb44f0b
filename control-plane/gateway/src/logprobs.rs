//! Log-probabilities in the three shapes that clients know: the completions' parallel lists, the
//! chat's list of tokens, and vLLM's map per prompt token.
//!
//! A log-probability is always a finite number: minus infinity is written as -9999, as vLLM does,
//! because JSON has no infinity and a null would be taken for "unknown".

use ids::TokenId;
use serde::ser::{Serialize, SerializeMap, Serializer};
use step::{Logprobs, TokenLogprob};
use text::Tokenizer;

/// Stands for minus infinity.
const LOWEST: f32 = -9999.0;

/// How tokens are spelled: as their text, or as `token_id:7`.
#[derive(Clone, Copy)]
pub(crate) struct Names<'a> {
    tokenizer: Option<&'a Tokenizer>,
}

impl<'a> Names<'a> {
    /// Text by this tokenizer; ids without one.
    pub(crate) fn new(tokenizer: Option<&'a Tokenizer>) -> Self {
        Self { tokenizer }
    }

    /// The token's text; bytes that are no UTF-8 by themselves become U+FFFD.
    pub(crate) fn name(self, token: TokenId) -> String {
        match self.tokenizer {
            None => format!("token_id:{token}"),
            Some(tokenizer) => String::from_utf8_lossy(tokenizer.bytes_of(token)).into_owned(),
        }
    }

    /// The token's exact bytes.
    fn bytes(self, token: TokenId) -> Option<Vec<u8>> {
        Some(self.tokenizer?.bytes_of(token).to_vec())
    }
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_nan() { LOWEST } else { logprob.clamp(LOWEST, 0.0) }
}

/// The alternatives to report, in order of likelihood, the token itself last where it is not one.
fn alternatives(logprobs: &Logprobs, count: u8) -> impl Iterator<Item = &TokenLogprob> {
    let top = &logprobs.top[..logprobs.top.len().min(usize::from(count))];
    let among = top.iter().any(|entry| entry.token == logprobs.chosen.token);
    top.iter().chain((!among).then_some(&logprobs.chosen))
}

/// A JSON object of floats whose order is kept.
#[derive(Debug, Default)]
pub(crate) struct FloatMap(Vec<(String, f32)>);

impl FloatMap {
    /// Two tokens may have one spelling; the likelier, which comes first, stays.
    fn insert(&mut self, name: String, value: f32) {
        if self.0.iter().all(|(known, _)| *known != name) {
            self.0.push((name, value));
        }
    }
}

impl Serialize for FloatMap {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

/// `logprobs` of /v1/completions.
#[derive(Debug, Default, serde::Serialize)]
pub(crate) struct CompletionLogprobs {
    text_offset: Vec<usize>,
    token_logprobs: Vec<Option<f32>>,
    tokens: Vec<String>,
    top_logprobs: Vec<Option<FloatMap>>,
}

impl CompletionLogprobs {
    /// Adds a token; `offset` counts characters and moves past it. `None` is the first token of a
    /// prompt, which has no probability.
    pub(crate) fn push(
        &mut self,
        token: TokenId,
        logprobs: Option<&Logprobs>,
        count: u8,
        names: Names<'_>,
        offset: &mut usize,
    ) {
        let name = names.name(token);
        self.text_offset.push(*offset);
        *offset += name.chars().count();
        self.token_logprobs.push(logprobs.map(|logprobs| finite(logprobs.chosen.logprob)));
        self.top_logprobs.push(logprobs.map(|logprobs| {
            let mut map = FloatMap::default();
            for entry in alternatives(logprobs, count) {
                map.insert(names.name(entry.token), finite(entry.logprob));
            }
            map
        }));
        self.tokens.push(name);
    }
}

/// `logprobs` of /v1/chat/completions.
#[derive(Debug, Default, serde::Serialize)]
pub(crate) struct ChatLogprobs {
    content: Vec<ChatToken>,
    refusal: Option<()>,
}

#[derive(Debug, serde::Serialize)]
struct ChatToken {
    token: String,
    logprob: f32,
    bytes: Option<Vec<u8>>,
    top_logprobs: Vec<ChatAlternative>,
}

#[derive(Debug, serde::Serialize)]
struct ChatAlternative {
    token: String,
    logprob: f32,
    bytes: Option<Vec<u8>>,
}

impl ChatLogprobs {
    /// Adds a generated token with its `count` alternatives.
    pub(crate) fn push(&mut self, logprobs: &Logprobs, count: u8, names: Names<'_>) {
        let spell = |entry: &TokenLogprob| ChatAlternative {
            token: names.name(entry.token),
            logprob: finite(entry.logprob),
            bytes: names.bytes(entry.token),
        };
        let ChatAlternative { token, logprob, bytes } = spell(&logprobs.chosen);
        let top_logprobs = logprobs.top.iter().take(usize::from(count)).map(spell).collect();
        self.content.push(ChatToken { token, logprob, bytes, top_logprobs });
    }
}

/// `prompt_logprobs`: null for the first token, then a map from token id to its entry.
pub(crate) fn prompt_logprobs(
    entries: &[Logprobs],
    count: u8,
    names: Names<'_>,
) -> Vec<Option<PromptEntry>> {
    let entry = |logprobs: &Logprobs| {
        let entries = alternatives(logprobs, count).map(|entry| {
            let value = PromptToken {
                logprob: finite(entry.logprob),
                rank: entry.rank,
                decoded_token: names.name(entry.token),
            };
            (entry.token.0, value)
        });
        Some(PromptEntry(entries.collect()))
    };
    std::iter::once(None).chain(entries.iter().map(entry)).collect()
}

/// A prompt token and its alternatives by token id.
#[derive(Debug)]
pub(crate) struct PromptEntry(Vec<(u32, PromptToken)>);

#[derive(Debug, serde::Serialize)]
struct PromptToken {
    logprob: f32,
    rank: u32,
    decoded_token: String,
}

impl Serialize for PromptEntry {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (token, value) in &self.0 {
            map.serialize_entry(&token.to_string(), value)?;
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_log_probability_is_null_and_digits_are_kept() {
        let entry = |token, logprob| TokenLogprob { token: TokenId(token), logprob, rank: 1 };
        let logprobs = Logprobs {
            chosen: entry(3, f32::NEG_INFINITY),
            top: vec![entry(1, -0.123_456_79), entry(2, -1.5)],
        };
        let mut chat = ChatLogprobs::default();
        chat.push(&logprobs, 1, Names::new(None));
        let json = serde_json::to_string(&chat).expect("serialises");
        assert_eq!(
            json,
            r#"{"content":[{"token":"token_id:3","logprob":-9999.0,"bytes":null,"top_logprobs":[{"token":"token_id:1","logprob":-0.12345679,"bytes":null}]}],"refusal":null}"#
        );
        let prompt = prompt_logprobs(std::slice::from_ref(&logprobs), 1, Names::new(None));
        let json = serde_json::to_value(&prompt).expect("serialises");
        assert!(json[0].is_null());
        assert_eq!(json[1]["3"]["logprob"], -9999.0);
        assert_eq!(json[1].as_object().map(serde_json::Map::len), Some(2));
    }
}
