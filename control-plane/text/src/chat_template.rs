//! Messages to one prompt, by the model's own chat template.
//!
//! The template comes from the model folder and is never taken from a request. Rendering has a
//! budget of instructions, of nesting and of output, so a hostile request or template costs
//! milliseconds. What messages say stays text (see [`crate::protect`]).

use crate::jinja::{self, Raised};
use crate::protect::{Protector, Rendered};
use crate::tokenizer::TokenizerConfig;
use crate::{LoadError, Tokenizer};
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, Value};
use serde_json::{Map, json};

/// Instructions that a render may take, before anything is added for its input.
const FUEL_BASE: u64 = 500_000;
/// Instructions added for each message: several times what published templates use.
const FUEL_PER_MESSAGE: u64 = 2_000;
/// A rendered chat may be this much longer than its messages, plus [`OUTPUT_PER_MESSAGE`] for each.
const OUTPUT_BASE: usize = 1 << 20;
/// Bytes around one message.
const OUTPUT_PER_MESSAGE: usize = 4 << 10;
/// Marks of reasoning in an answer that a client sends back: templates take them apart, so they
/// reach the template whole. They open no turn.
const REASONING_MARKS: [&str; 2] = ["<think>", "</think>"];
/// Variables that requests may not set: they belong to the server or to other fields.
const RESERVED: [&str; 7] = [
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "chat_template",
    "tokenize",
    "continue_final_message",
];

/// Who says a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Instructions of whoever runs the application.
    System,
    /// The same under its newer name.
    Developer,
    /// The person.
    User,
    /// The model.
    Assistant,
}

impl Role {
    /// As templates and clients spell it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Developer => "developer",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }

    /// The role of this name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        [Self::System, Self::Developer, Self::User, Self::Assistant]
            .into_iter()
            .find(|role| role.as_str() == name)
    }
}

/// One message of a chat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatMessage {
    /// Who says it.
    pub role: Role,
    /// What is said.
    pub content: String,
    /// The participant's name, where a client gives one.
    pub name: Option<String>,
    /// An earlier answer's reasoning, where a client sends it back.
    pub reasoning: Option<String>,
}

/// How a chat is rendered.
#[derive(Clone, Debug)]
pub struct TemplateOptions {
    /// End with the opening of the model's turn.
    pub add_generation_prompt: bool,
    /// Further variables, such as `enable_thinking`.
    pub kwargs: Map<String, serde_json::Value>,
}

impl Default for TemplateOptions {
    fn default() -> Self {
        Self { add_generation_prompt: true, kwargs: Map::new() }
    }
}

/// Why a chat was not rendered. All of them are about the request.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The template refuses the messages, in its own words.
    #[error("the chat template refuses these messages: {0}")]
    Refused(String),
    /// The template failed on these messages.
    #[error("the chat template fails on these messages: {0}")]
    Failed(String),
    /// Rendering took more than its budget.
    #[error("the chat template takes too long or writes too much for these messages")]
    TooMuch,
    /// A variable that requests may not set.
    #[error("{0:?} may not be set in chat_template_kwargs")]
    ReservedVariable(String),
    /// The messages use every noncharacter of Unicode.
    #[error("the messages use all Unicode noncharacters from U+FDD0 to U+FDEF; leave one out")]
    NoMarkLeft,
}

const NAME: &str = "chat_template";

/// A model's chat template, compiled.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    /// `bos_token` and so on, as tokenizer_config.json gives them.
    tokens: Vec<(&'static str, String)>,
}

impl ChatTemplate {
    /// Compiles the template of a folder: the text of chat_template.jinja if there is one, else
    /// `chat_template` of tokenizer_config.json (a string, or the one named `default` of a list).
    ///
    /// # Errors
    /// When the file is not valid or the template does not compile.
    pub fn from_bytes(config: &[u8], jinja: Option<String>) -> Result<Option<Self>, LoadError> {
        let config: TokenizerConfig = serde_json::from_slice(config)
            .map_err(|source| LoadError::Json { file: "tokenizer_config.json", source })?;
        Self::new(&config, jinja)
    }

    pub(crate) fn new(
        config: &TokenizerConfig,
        jinja: Option<String>,
    ) -> Result<Option<Self>, LoadError> {
        let Some(source) = jinja.or_else(|| template_of(config.chat_template.as_ref()?)) else {
            return Ok(None);
        };
        let mut env = jinja::environment();
        env.add_template_owned(NAME, source)
            .map_err(|error| LoadError::ChatTemplate(format!("{error:#}")))?;
        let tokens = [
            ("bos_token", &config.bos_token),
            ("eos_token", &config.eos_token),
            ("pad_token", &config.pad_token),
            ("unk_token", &config.unk_token),
        ];
        let tokens = tokens
            .into_iter()
            .filter_map(|(name, token)| Some((name, token.as_ref()?.text().to_owned())))
            .collect();
        Ok(Some(Self { env, tokens }))
    }

    /// Renders `messages`; what they say will not become control tokens of `tokenizer`.
    ///
    /// # Errors
    /// When the template refuses, fails, or takes too much; all of them concern this request alone.
    pub fn render(
        &self,
        tokenizer: &Tokenizer,
        messages: &[ChatMessage],
        options: &TemplateOptions,
    ) -> Result<Rendered, TemplateError> {
        let reserved = |key: &&String| {
            RESERVED.contains(&key.as_str()) || self.tokens.iter().any(|(name, _)| name == key)
        };
        if let Some(key) = options.kwargs.keys().find(reserved) {
            return Err(TemplateError::ReservedVariable(key.clone()));
        }
        let mut texts = Vec::with_capacity(messages.len());
        for message in messages {
            texts.push(message.content.as_str());
            texts.extend(message.name.as_deref());
            texts.extend(message.reasoning.as_deref());
        }
        options.kwargs.values().for_each(|value| collect_strings(value, &mut texts));
        let input: usize = texts.iter().map(|text| text.len()).sum();
        let mut protector = Protector::new(tokenizer.control(), texts.into_iter())
            .map_err(|_| TemplateError::NoMarkLeft)?;

        let messages_json = messages.iter().map(|m| message_json(m, &mut protector)).collect();
        let mut context = Map::new();
        context.insert("messages".to_owned(), serde_json::Value::Array(messages_json));
        context.insert("tools".to_owned(), serde_json::Value::Null);
        context.insert("documents".to_owned(), serde_json::Value::Null);
        context.insert("add_generation_prompt".to_owned(), options.add_generation_prompt.into());
        for (name, token) in &self.tokens {
            context.insert((*name).to_owned(), token.as_str().into());
        }
        for (key, value) in &options.kwargs {
            let mut value = value.clone();
            protect_strings(&mut value, &mut protector);
            context.insert(key.clone(), value);
        }

        let count = messages.len() as u64;
        let mut env = self.env.clone();
        env.set_fuel(Some(FUEL_BASE + FUEL_PER_MESSAGE * count + input as u64));
        let template = env.get_template(NAME).map_err(failed)?;
        let text = template.render(Value::from(Serde(&context))).map_err(failed)?;
        if text.len() > OUTPUT_BASE + OUTPUT_PER_MESSAGE * messages.len() + 4 * input {
            return Err(TemplateError::TooMuch);
        }
        Ok(Rendered::new(text, protector.mark()))
    }
}

fn failed(error: minijinja::Error) -> TemplateError {
    if error.kind() == ErrorKind::OutOfFuel {
        return TemplateError::TooMuch;
    }
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(current) = cause {
        if let Some(Raised(message)) = current.downcast_ref() {
            return TemplateError::Refused(message.clone());
        }
        cause = current.source();
    }
    TemplateError::Failed(error.to_string())
}

fn template_of(value: &serde_json::Value) -> Option<String> {
    match value {
        serde_json::Value::String(source) => Some(source.clone()),
        serde_json::Value::Array(named) => named
            .iter()
            .find(|entry| entry["name"] == "default")
            .and_then(|entry| entry["template"].as_str())
            .map(str::to_owned),
        _ => None,
    }
}

fn message_json(message: &ChatMessage, protector: &mut Protector<'_>) -> serde_json::Value {
    let except: &[&str] = if message.role == Role::Assistant { &REASONING_MARKS } else { &[] };
    let content = protector.protect(&message.content, except);
    let mut json = json!({ "role": message.role.as_str(), "content": content });
    if let Some(name) = &message.name {
        json["name"] = protector.protect(name, &[]).into();
    }
    if let Some(reasoning) = &message.reasoning {
        // Families differ in what they call it.
        let reasoning = protector.protect(reasoning, &[]);
        json["reasoning_content"] = reasoning.as_ref().into();
        json["reasoning"] = reasoning.into();
    }
    json
}

fn collect_strings<'a>(value: &'a serde_json::Value, texts: &mut Vec<&'a str>) {
    match value {
        serde_json::Value::String(text) => texts.push(text),
        serde_json::Value::Array(items) => {
            items.iter().for_each(|item| collect_strings(item, texts));
        }
        serde_json::Value::Object(fields) => {
            for (key, item) in fields {
                texts.push(key);
                collect_strings(item, texts);
            }
        }
        _ => {}
    }
}

/// Protects strings and keys alike: a template may print either.
fn protect_strings(value: &mut serde_json::Value, protector: &mut Protector<'_>) {
    match value {
        serde_json::Value::String(text) => *text = protector.protect(text, &[]).into_owned(),
        serde_json::Value::Array(items) => {
            items.iter_mut().for_each(|item| protect_strings(item, protector));
        }
        serde_json::Value::Object(fields) => {
            let entries = std::mem::take(fields);
            for (key, mut item) in entries {
                protect_strings(&mut item, protector);
                fields.insert(protector.protect(&key, &[]).into_owned(), item);
            }
        }
        _ => {}
    }
}
