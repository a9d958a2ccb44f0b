//! A model's chat template, run under limits.
//!
//! Templates come with checkpoints and are untrusted: they get fuel, a recursion limit and a bound on
//! their output, and no way to read files. Invariant: rendering ends, by text or by error.

use crate::tokenizer::{LoadError, token_text};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value as Jinja};
use minijinja::{Environment, ErrorKind, State};
use serde_json::Value;
use std::path::Path;

/// Instructions that one rendering may take.
const FUEL: u64 = 4_000_000;
/// Calls inside calls.
const RECURSION: usize = 64;
/// Bytes that one rendering may produce.
const MAX_OUTPUT: usize = 16 << 20;

/// A parsed template with the tokens it may name.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token`, `eos_token` and the like from tokenizer_config.json.
    tokens: Vec<(&'static str, String)>,
}

/// Why a conversation cannot be rendered. The text is for the client.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The template refused (`raise_exception`) or failed on this conversation.
    #[error("the chat template refused the conversation: {0}")]
    Refused(String),
    /// A limit was hit.
    #[error("the chat template took more than {0}")]
    Limit(&'static str),
}

impl ChatTemplate {
    /// The template of a folder: `chat_template.jinja`, or `chat_template` in
    /// tokenizer_config.json; `None` where there is neither.
    ///
    /// # Errors
    /// When a file is there and cannot be used.
    pub fn load(folder: &Path) -> Result<Option<Self>, LoadError> {
        let path = folder.join("tokenizer_config.json");
        let config: Value = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|e| LoadError::Invalid { path: path.clone(), reason: e.to_string() })?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Value::Null,
            Err(source) => return Err(LoadError::Read { path, source }),
        };
        let file = folder.join("chat_template.jinja");
        let (source, path) = match std::fs::read_to_string(&file) {
            Ok(text) => (Some(text), file),
            Err(_) => (template_of(&config), path),
        };
        source
            .map(|source| Self::parse(source, &config))
            .transpose()
            .map_err(|reason| LoadError::Invalid { path, reason })
    }

    /// Parses a template; `config` is the parsed tokenizer_config.json, or null.
    ///
    /// # Errors
    /// The syntax error with its line.
    pub fn parse(source: String, config: &Value) -> Result<Self, String> {
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(RECURSION);
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| error.to_string())?);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_filter("tojson", to_json);
        environment.add_template_owned("chat", source).map_err(|error| format!("{error:#}"))?;
        let tokens = ["bos_token", "eos_token", "unk_token", "pad_token"]
            .into_iter()
            .filter_map(|name| Some((name, token_text(config, name)?)))
            .collect();
        Ok(Self { environment, tokens })
    }

    /// Renders a conversation. `extra` is the client's `chat_template_kwargs`.
    ///
    /// # Errors
    /// When the template refuses, fails, or takes too much.
    pub fn render(
        &self,
        messages: &Value,
        add_generation_prompt: bool,
        extra: &serde_json::Map<String, Value>,
    ) -> Result<String, TemplateError> {
        let mut context = serde_json::Map::new();
        for (name, text) in &self.tokens {
            context.insert((*name).to_owned(), Value::from(text.as_str()));
        }
        context.extend(extra.clone());
        context.insert("messages".to_owned(), messages.clone());
        context.insert("add_generation_prompt".to_owned(), add_generation_prompt.into());
        let template = self
            .environment
            .get_template("chat")
            .map_err(|error| TemplateError::Refused(error.to_string()))?;
        let rendered = template.render(minijinja::value::Serde(&context));
        let text = rendered.map_err(|error| match error.kind() {
            ErrorKind::OutOfFuel => TemplateError::Limit("its share of instructions"),
            _ => TemplateError::Refused(
                error.detail().map_or_else(|| error.to_string(), str::to_owned),
            ),
        })?;
        if text.len() > MAX_OUTPUT {
            return Err(TemplateError::Limit("16 MiB of text"));
        }
        Ok(text)
    }
}

/// A single template, or the one named `default` of several.
fn template_of(config: &Value) -> Option<String> {
    let value = config.get("chat_template")?;
    if let Some(text) = value.as_str() {
        return Some(text.to_owned());
    }
    let named = |entry: &&Value| entry["name"] == "default";
    value.as_array()?.iter().find(named)?["template"].as_str().map(str::to_owned)
}

fn raise_exception(message: String) -> Result<Jinja, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// JSON as Python prints it: `", "` and `": "` between elements, text unescaped beyond need,
/// optionally indented.
fn to_json(_: &State, value: Jinja, options: Kwargs) -> Result<Jinja, minijinja::Error> {
    let failed = |error: serde_json::Error| {
        minijinja::Error::new(ErrorKind::BadSerialization, error.to_string())
    };
    let indent: Option<usize> = options.get("indent")?;
    // Accepted for compatibility; text is never escaped to ASCII, as the reference's default.
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let value = serde_json::to_value(&value).map_err(failed)?;
    let mut text = String::new();
    write_json(&value, indent, 0, &mut text).map_err(failed)?;
    Ok(Jinja::from_safe_string(text))
}

fn write_json(
    value: &Value,
    indent: Option<usize>,
    level: usize,
    out: &mut String,
) -> Result<(), serde_json::Error> {
    let line = |out: &mut String, level: usize| {
        if let Some(width) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', width * level));
        }
    };
    let between = if indent.is_some() { "," } else { ", " };
    match value {
        Value::Array(items) if !items.is_empty() => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                out.push_str(if i > 0 { between } else { "" });
                line(out, level + 1);
                write_json(item, indent, level + 1, out)?;
            }
            line(out, level);
            out.push(']');
        }
        Value::Object(fields) if !fields.is_empty() => {
            out.push('{');
            for (i, (name, item)) in fields.iter().enumerate() {
                out.push_str(if i > 0 { between } else { "" });
                line(out, level + 1);
                out.push_str(&serde_json::to_string(name)?);
                out.push_str(": ");
                write_json(item, indent, level + 1, out)?;
            }
            line(out, level);
            out.push('}');
        }
        plain => out.push_str(&serde_json::to_string(plain)?),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(source: &str, messages: &Value) -> Result<String, TemplateError> {
        let config = json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>"});
        let template = ChatTemplate::parse(source.to_owned(), &config).expect("parses");
        template.render(messages, true, &serde_json::Map::new())
    }

    #[test]
    fn what_published_templates_use_works() {
        let source = "{{ bos_token }}{%- for m in messages %}
            {%- if m['role'] == 'user' %}{{ '[U]' + m.content.strip().upper() }}
            {%- elif m.role.startswith('a') %}{{ '[A]' ~ m.content[1:] ~ eos_token }}{% endif %}
            {%- set ns = namespace(x=loop.index0) %}{% endfor %}
            {%- if add_generation_prompt %}{{ '[A]' }}{% endif %}";
        let messages =
            json!([{"role": "user", "content": " hi "}, {"role": "assistant", "content": "xyz"}]);
        assert_eq!(render(source, &messages).expect("renders"), "<s>[U]HI[A]yz</s>[A]");
    }

    #[test]
    fn json_is_written_as_python_writes_it() {
        let messages = json!([{"a": [1, 2.5, "é\"<"], "b": {}, "c": null}]);
        let text = render("{{ messages[0] | tojson }}", &messages).expect("renders");
        assert_eq!(text, r#"{"a": [1, 2.5, "é\"<"], "b": {}, "c": null}"#);
        let text = render("{{ messages[0].a | tojson(indent=2) }}", &messages).expect("renders");
        assert_eq!(text, "[\n  1,\n  2.5,\n  \"é\\\"<\"\n]");
    }

    #[test]
    fn a_template_ends() {
        let loops = "{% for a in range(9999) %}{% for b in range(9999) %}{{ a * b }}{% endfor %}{% endfor %}";
        assert!(matches!(render(loops, &json!([])), Err(TemplateError::Limit(_))));
        let refused = render("{{ raise_exception('only users speak') }}", &json!([]));
        assert!(refused.expect_err("refused").to_string().contains("only users speak"));
        assert!(render("{{ messages.__class__.mro() }}", &json!([])).is_err());
    }
}
