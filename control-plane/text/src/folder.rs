//! What a model folder says about text: tokenizer, chat template, defaults of generation, ends.
//!
//! Files are read through a function, so a folder, an archive or bytes in the binary serve alike.
//! A missing tokenizer is no error: such a model serves token ids. A broken file is one.

use crate::tokenizer::TokenizerConfig;
use crate::{ChatTemplate, LoadError, Tokenizer};
use ids::TokenId;
use serde::Deserialize;
use std::path::Path;
use std::sync::Arc;

/// No text file of a model is larger.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// Why a folder's text side was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// A file exists and cannot be read.
    #[error("{file} cannot be read")]
    Io {
        /// Which file.
        file: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error(transparent)]
    Load(#[from] LoadError),
}

/// Defaults that a model's authors give in generation_config.json. Requests override them.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct GenerationConfig {
    /// 0 is greedy.
    pub temperature: Option<f32>,
    /// Tokens kept; 0 or -1 keeps all.
    pub top_k: Option<i64>,
    /// Mass kept.
    pub top_p: Option<f32>,
    /// Least likelihood kept, relative to the likeliest.
    pub min_p: Option<f32>,
    /// 1 is off.
    pub repetition_penalty: Option<f32>,
    /// Default and upper bound of generated tokens.
    pub max_new_tokens: Option<u32>,
    eos_token_id: Option<OneOrMany>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl OneOrMany {
    fn tokens(&self) -> impl Iterator<Item = TokenId> {
        match self {
            Self::One(id) => std::slice::from_ref(id),
            Self::Many(ids) => ids.as_slice(),
        }
        .iter()
        .copied()
        .map(TokenId)
    }
}

/// Tokens that end an answer; sorted, none twice.
pub type EndTokens = Arc<[TokenId]>;

/// The text side of a model.
#[derive(Debug)]
pub struct TextFolder {
    /// Absent where the folder has no tokenizer.json.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// Absent where the folder has no template, or no tokenizer to use it with.
    pub template: Option<ChatTemplate>,
    /// Defaults of generation.
    pub generation: GenerationConfig,
    /// From generation_config.json, else config.json, and the tokenizer's end token.
    pub ends: EndTokens,
}

impl TextFolder {
    /// Loads the folder at `path`.
    ///
    /// # Errors
    /// When a file is there and unusable.
    pub fn load(path: &Path) -> Result<Self, FolderError> {
        Self::from_files(|name| Self::read(path, name))
    }

    /// A file of the folder at `path`, where there is one; for readers of [`Self::from_files`].
    ///
    /// # Errors
    /// When it cannot be read, or is larger than any such file should be.
    pub fn read(path: &Path, name: &str) -> std::io::Result<Option<Vec<u8>>> {
        let file = path.join(name);
        match std::fs::metadata(&file) {
            Ok(meta) if meta.len() > MAX_FILE_BYTES => {
                Err(std::io::Error::other("it is larger than any such file should be"))
            }
            Ok(_) => std::fs::read(&file).map(Some),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Loads from whatever `read` finds under the names that published folders use.
    ///
    /// # Errors
    /// When a file is there and unusable.
    pub fn from_files(
        read: impl Fn(&str) -> std::io::Result<Option<Vec<u8>>>,
    ) -> Result<Self, FolderError> {
        let read = |name: &str| {
            read(name).map_err(|source| FolderError::Io { file: name.to_owned(), source })
        };
        let config: TokenizerConfig =
            parse("tokenizer_config.json", read("tokenizer_config.json")?)?;
        let generation: GenerationConfig =
            parse("generation_config.json", read("generation_config.json")?)?;
        // Of the model's config.json only this field; multimodal files nest it.
        #[derive(Default, Deserialize)]
        #[serde(default)]
        struct ModelConfig {
            eos_token_id: Option<OneOrMany>,
            text_config: Option<Box<ModelConfig>>,
        }
        let model: ModelConfig = parse("config.json", read("config.json")?)?;

        let tokenizer = match read("tokenizer.json")? {
            None => None,
            Some(bytes) => Some(Arc::new(Tokenizer::new(&bytes, &config)?)),
        };
        let template = match &tokenizer {
            None => None,
            Some(_) => {
                let jinja = read("chat_template.jinja")?.map(String::from_utf8).transpose();
                let jinja = jinja.map_err(|_| {
                    LoadError::ChatTemplate("chat_template.jinja is not UTF-8".to_owned())
                })?;
                ChatTemplate::new(&config, jinja)?
            }
        };

        let nested = model.text_config.and_then(|text| text.eos_token_id);
        let listed = generation.eos_token_id.clone().or(model.eos_token_id).or(nested);
        let mut ends: Vec<TokenId> = listed.iter().flat_map(OneOrMany::tokens).collect();
        if let (Some(tokenizer), Some(eos)) = (&tokenizer, &config.eos_token) {
            ends.extend(tokenizer.token_id(eos.text()));
        }
        ends.sort_unstable();
        ends.dedup();
        Ok(Self { tokenizer, template, generation, ends: ends.into() })
    }
}

fn parse<T: Default + serde::de::DeserializeOwned>(
    file: &'static str,
    bytes: Option<Vec<u8>>,
) -> Result<T, LoadError> {
    match bytes {
        None => Ok(T::default()),
        Some(bytes) => {
            serde_json::from_slice(&bytes).map_err(|source| LoadError::Json { file, source })
        }
    }
}
