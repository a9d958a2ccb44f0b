//! Text to token ids and back, as the model's tokenizer.json says.
//!
//! Encoding has two forms. [`Tokenizer::encode`] reads control tokens out of the text, for prompts
//! that the client wrote whole. [`Tokenizer::encode_chat`] takes a rendered chat, where only the
//! template's own text may name control tokens (see [`crate::protect`]). It does not truncate or
//! pad. Invariant: ids handed out are below [`Tokenizer::len`].

use crate::detokenize::{Detokenizer, Start};
use crate::protect::{ControlTokens, Rendered};
use crate::token_bytes::TokenBytes;
use ids::TokenId;
use serde::Deserialize;
use std::sync::{Arc, OnceLock};
use tokenizers::AddedToken;

/// Why a tokenizer was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The `tokenizers` library does not take the file.
    #[error("tokenizer.json is not usable: {0}")]
    Tokenizer(String),
    /// Not JSON, or not the expected fields.
    #[error("{file} is not valid")]
    Json {
        /// Which file.
        file: &'static str,
        /// What the parser says.
        #[source]
        source: serde_json::Error,
    },
    /// A decoder this engine does not know; approximating it would corrupt text silently.
    #[error("the decoder of tokenizer.json is not supported: {0}")]
    Decoder(String),
    /// The chat template does not compile.
    #[error("the chat template is not usable: {0}")]
    ChatTemplate(String),
    /// Token texts exceed 4 GiB, or an id is absurd.
    #[error("the vocabulary of tokenizer.json is too large")]
    VocabularyTooLarge,
    /// `add_bos_token` is set and there is no such token.
    #[error("tokenizer_config.json asks for {field} and {token:?} is not in tokenizer.json")]
    MissingToken {
        /// The field that asks.
        field: &'static str,
        /// The token.
        token: String,
    },
}

/// Why a text was not encoded.
#[derive(Debug, thiserror::Error)]
#[error("the tokenizer cannot encode the text: {0}")]
pub struct EncodeError(String);

/// What tokenizer_config.json says about tokens. Other fields belong to transformers.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct TokenizerConfig {
    pub(crate) add_bos_token: Option<bool>,
    pub(crate) add_eos_token: Option<bool>,
    pub(crate) bos_token: Option<NamedToken>,
    pub(crate) eos_token: Option<NamedToken>,
    pub(crate) pad_token: Option<NamedToken>,
    pub(crate) unk_token: Option<NamedToken>,
    pub(crate) additional_special_tokens: Option<Vec<NamedToken>>,
    pub(crate) chat_template: Option<serde_json::Value>,
}

/// A special token as its text or as an object that holds it.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(crate) enum NamedToken {
    Text(String),
    Object { content: String },
}

impl NamedToken {
    pub(crate) fn text(&self) -> &str {
        match self {
            Self::Text(text) | Self::Object { content: text } => text,
        }
    }
}

/// Ids above this are not believed; the largest published vocabularies have under a million.
const MAX_VOCABULARY: usize = 16 << 20;

/// A model's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    full: tokenizers::Tokenizer,
    /// The same without control tokens; made when a chat first holds their text.
    plain: OnceLock<tokenizers::Tokenizer>,
    bytes: TokenBytes,
    special: Box<[bool]>,
    control: ControlTokens,
    /// Put before a prompt, where it is not there already.
    bos: Edge,
    /// Put after a prompt.
    eos: Edge,
}

/// What tokenizer_config.json says about a token at the edge of a prompt.
#[derive(Clone, Copy, Debug)]
enum Edge {
    /// Nothing: the post-processor decides.
    Unsaid,
    Add(TokenId),
    Leave,
}

impl Tokenizer {
    /// Reads tokenizer.json and, where the folder has one, tokenizer_config.json.
    ///
    /// # Errors
    /// When a file is broken or needs what this engine does not have.
    pub fn from_bytes(tokenizer: &[u8], config: Option<&[u8]>) -> Result<Self, LoadError> {
        let config = match config {
            None => TokenizerConfig::default(),
            Some(bytes) => serde_json::from_slice(bytes)
                .map_err(|source| LoadError::Json { file: "tokenizer_config.json", source })?,
        };
        Self::new(tokenizer, &config)
    }

    pub(crate) fn new(file: &[u8], config: &TokenizerConfig) -> Result<Self, LoadError> {
        #[derive(Deserialize)]
        struct Decoder {
            decoder: serde_json::Value,
        }
        let full = tokenizers::Tokenizer::from_bytes(file)
            .map_err(|error| LoadError::Tokenizer(error.to_string()))?;
        let Decoder { decoder } = serde_json::from_slice(file)
            .map_err(|source| LoadError::Json { file: "tokenizer.json", source })?;

        let vocabulary = full.get_vocab(true);
        let len = vocabulary.values().max().map_or(0, |&max| max as usize + 1);
        if len > MAX_VOCABULARY {
            return Err(LoadError::VocabularyTooLarge);
        }
        let mut tokens: Vec<Option<&str>> = vec![None; len];
        for (token, &id) in &vocabulary {
            tokens[id as usize] = Some(token);
        }
        let bytes = TokenBytes::new(&decoder, tokens.into_iter())?;

        let named = [&config.bos_token, &config.eos_token, &config.pad_token, &config.unk_token];
        let named = named.into_iter().flatten();
        let named = named.chain(config.additional_special_tokens.iter().flatten());
        let named: Vec<&str> = named.map(NamedToken::text).collect();
        let added = full.get_added_tokens_decoder();
        let mut special = vec![false; len];
        for (&id, token) in &added {
            special[id as usize] = token.special || named.contains(&token.content.as_str());
        }
        let control = added
            .iter()
            .filter(|(id, token)| special[**id as usize] || is_markup(&token.content))
            .map(|(&id, token)| (TokenId(id), token.clone()));
        let control = ControlTokens::new(control.collect());

        let edge = |field, said: Option<bool>, token: &Option<NamedToken>| match (said, token) {
            (None, _) | (Some(true), None) => Ok(Edge::Unsaid),
            (Some(false), _) => Ok(Edge::Leave),
            (Some(true), Some(token)) => full
                .token_to_id(token.text())
                .map(|id| Edge::Add(TokenId(id)))
                .ok_or_else(|| LoadError::MissingToken { field, token: token.text().to_owned() }),
        };
        let bos = edge("add_bos_token", config.add_bos_token, &config.bos_token)?;
        let eos = edge("add_eos_token", config.add_eos_token, &config.eos_token)?;
        let special = special.into();
        Ok(Self { full, plain: OnceLock::new(), bytes, special, control, bos, eos })
    }

    /// Ids are below this. A model's vocabulary may be padded beyond it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.special.len()
    }

    /// Whether there are no tokens at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.special.is_empty()
    }

    /// Tokens of `text`; text of control tokens becomes control tokens. `add_special` adds what the
    /// model expects around a prompt (usually a begin token).
    ///
    /// # Errors
    /// When the tokenizer cannot express the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, EncodeError> {
        if !add_special {
            return run(&self.full, text, false);
        }
        // An explicit word in the config outranks the post-processor, as in transformers.
        let post_processed = matches!((self.bos, self.eos), (Edge::Unsaid, Edge::Unsaid));
        if post_processed {
            return run(&self.full, text, true);
        }
        let bare = run(&self.full, text, false)?;
        let mut tokens = Vec::with_capacity(bare.len() + 2);
        match self.bos {
            Edge::Add(bos) => tokens.push(bos),
            Edge::Leave => {}
            Edge::Unsaid => {
                let whole = run(&self.full, text, true)?;
                let leading = whole.len().saturating_sub(bare.len());
                tokens.extend(whole.iter().take(leading).filter(|_| whole.ends_with(&bare)));
            }
        }
        tokens.extend_from_slice(&bare);
        if let Edge::Add(eos) = self.eos {
            tokens.push(eos);
        }
        Ok(tokens)
    }

    /// Tokens of a rendered chat; only the template's own text names control tokens.
    ///
    /// # Errors
    /// When the tokenizer cannot express the text.
    pub fn encode_chat(&self, chat: &Rendered) -> Result<Vec<TokenId>, EncodeError> {
        let Some(mark) = chat.mark() else {
            return run(&self.full, chat.text(), false);
        };
        let plain = self.plain.get_or_init(|| self.control.without(&self.full));
        let mut tokens = Vec::new();
        for (text, control) in self.control.split(chat.text()) {
            let text: String = text.chars().filter(|c| *c != mark).collect();
            if !text.is_empty() {
                tokens.extend(run(plain, &text, false)?);
            }
            tokens.extend(control);
        }
        Ok(tokens)
    }

    /// Text of `tokens`. Bytes that are no UTF-8 become U+FFFD.
    #[must_use]
    pub fn decode(self: &Arc<Self>, tokens: &[TokenId], skip_special: bool) -> String {
        let mut text = String::new();
        let mut detokenizer = Detokenizer::new(Arc::clone(self), Start::Text, skip_special);
        for &token in tokens {
            detokenizer.push(token, &mut text);
        }
        detokenizer.finish(&mut text);
        text
    }

    /// The bytes `token` adds to a text; none where the id has no token.
    #[must_use]
    pub fn bytes_of(&self, token: TokenId) -> &[u8] {
        self.bytes.get(token)
    }

    /// Whether `token` is left out of text that is shown.
    #[must_use]
    pub fn is_special(&self, token: TokenId) -> bool {
        self.special.get(token.index()).copied().unwrap_or(false)
    }

    /// The id of a token by its text in the vocabulary.
    #[must_use]
    pub fn token_id(&self, token: &str) -> Option<TokenId> {
        self.full.token_to_id(token).map(TokenId)
    }

    /// The token's text in the vocabulary, as files spell it.
    #[must_use]
    pub fn token_name(&self, token: TokenId) -> Option<String> {
        self.full.id_to_token(token.0)
    }

    /// Length in bytes of the longest token: a text of `b` bytes has at least `b / this` tokens.
    #[must_use]
    pub fn longest_token(&self) -> usize {
        self.bytes.longest()
    }

    pub(crate) fn token_bytes(&self) -> &TokenBytes {
        &self.bytes
    }

    pub(crate) fn control(&self) -> &ControlTokens {
        &self.control
    }
}

/// Whether an added token is spelled like a mark: `<…>` or `[…]`. Families that flag their turn
/// marks as ordinary (DeepSeek's `<｜User｜>`) still use them for control; added words and runs of
/// spaces are text.
fn is_markup(token: &str) -> bool {
    (token.starts_with('<') && token.ends_with('>'))
        || (token.starts_with('[') && token.ends_with(']'))
}

fn run(
    tokenizer: &tokenizers::Tokenizer,
    text: &str,
    add_special: bool,
) -> Result<Vec<TokenId>, EncodeError> {
    let encoding =
        tokenizer.encode_fast(text, add_special).map_err(|error| EncodeError(error.to_string()))?;
    Ok(encoding.get_ids().iter().copied().map(TokenId).collect())
}

impl ControlTokens {
    /// `full` without these tokens: their text is encoded like any other text. Ids stay as they
    /// are, which removing the tokens would not guarantee.
    fn without(&self, full: &tokenizers::Tokenizer) -> tokenizers::Tokenizer {
        let mut plain = full.clone();
        let tokens: Vec<AddedToken> =
            self.tokens().map(|token| AddedToken { special: true, ..token.clone() }).collect();
        // Only tokens flagged special can be switched off; adding one again sets its flag.
        plain.add_special_tokens(tokens).expect("tokens that were added once can be added again");
        plain.set_encode_special_tokens(true);
        plain
    }
}
