//! The Jinja dialect of published chat templates: minijinja, with what Hugging Face's renderer adds.
//!
//! `tojson` prints as Python's `json.dumps` does, `raise_exception` and `strftime_now` exist, text
//! of `True` and `None` is Python's, and strings and dicts have their Python methods. Templates see
//! no file, no environment and no other template. The clock is the one thing from outside; it is
//! read when a template asks for it.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use serde::Serialize;
use std::fmt::Write as _;

/// Nesting of calls and loops; templates in use need under 20.
const RECURSION_LIMIT: usize = 100;

/// What a template says with `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Raised(pub(crate) String);

/// An environment without templates.
pub(crate) fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    env.set_syntax(syntax.expect("the default delimiters are valid"));
    env.set_recursion_limit(RECURSION_LIMIT);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.set_formatter(|out, state, value| match value.kind() {
        ValueKind::Bool => Ok(out.write_str(if value.is_true() { "True" } else { "False" })?),
        ValueKind::None => Ok(out.write_str("None")?),
        _ => minijinja::escape_formatter(out, state, value),
    });
    env.add_function("raise_exception", raise_exception);
    env.add_function("strftime_now", strftime_now);
    env.add_filter("tojson", tojson);
    env
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "raised by the template")
        .with_source(Raised(message)))
}

/// The present time in UTC, formatted as by C's `strftime`.
fn strftime_now(format: &str) -> Result<String, Error> {
    let now = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC);
    jiff::fmt::strtime::format(format, &now)
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))
}

/// `json.dumps(value, ensure_ascii=…, indent=…, separators=…, sort_keys=…)`, with
/// `ensure_ascii=False` by default, as transformers calls it.
fn tojson(state: &State, value: Value, args: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = args.get("indent")?;
    let ensure_ascii: Option<bool> = args.get("ensure_ascii")?;
    let sort_keys: Option<bool> = args.get("sort_keys")?;
    let separators: Option<Vec<String>> = args.get("separators")?;
    args.assert_all_used()?;
    let (item, key) = match separators.as_deref() {
        None if indent.is_some() => (",", ": "),
        None => (", ", ": "),
        Some([item, key]) => (item.as_str(), key.as_str()),
        Some(_) => {
            let error = "separators must be a pair of strings";
            return Err(Error::new(ErrorKind::InvalidOperation, error));
        }
    };
    let fail = |error: serde_json::Error| {
        Error::new(ErrorKind::InvalidOperation, "cannot be written as JSON").with_source(error)
    };
    let mut json = serde_json::to_value(&value).map_err(fail)?;
    if sort_keys == Some(true) {
        json.sort_all_objects();
    }
    let style = PythonStyle { item, key, indent, depth: 0, has_value: false };
    let mut bytes = Vec::new();
    json.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, style)).map_err(fail)?;
    // Filters of ours are charged only for what they return; the tree in between is of that size.
    state.consume_fuel(bytes.len() as u64 / 64)?;
    let text = String::from_utf8(bytes).expect("the serializer writes UTF-8");
    let text = if ensure_ascii == Some(true) { escape_non_ascii(&text) } else { text };
    Ok(Value::from(text))
}

/// `\uXXXX` for what is not ASCII; in JSON that is only found inside strings.
fn escape_non_ascii(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        if c.is_ascii() {
            out.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                // Writing to a string cannot fail.
                let _ = write!(out, "\\u{unit:04x}");
            }
        }
    }
    out
}

/// Separators and line breaks of Python's `json.dumps`.
struct PythonStyle<'a> {
    item: &'a str,
    key: &'a str,
    indent: Option<usize>,
    depth: usize,
    has_value: bool,
}

impl PythonStyle<'_> {
    fn new_line<W: ?Sized + std::io::Write>(&self, out: &mut W) -> std::io::Result<()> {
        match self.indent {
            None => Ok(()),
            Some(width) => write!(out, "\n{:1$}", "", width * self.depth),
        }
    }

    fn open<W: ?Sized + std::io::Write>(&mut self, out: &mut W, c: u8) -> std::io::Result<()> {
        self.depth += 1;
        self.has_value = false;
        out.write_all(&[c])
    }

    fn close<W: ?Sized + std::io::Write>(&mut self, out: &mut W, c: u8) -> std::io::Result<()> {
        self.depth -= 1;
        if self.has_value {
            self.new_line(out)?;
        }
        self.has_value = true;
        out.write_all(&[c])
    }

    fn item<W: ?Sized + std::io::Write>(&self, out: &mut W, first: bool) -> std::io::Result<()> {
        if !first {
            out.write_all(self.item.as_bytes())?;
        }
        self.new_line(out)
    }
}

impl serde_json::ser::Formatter for PythonStyle<'_> {
    fn begin_array<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        self.open(out, b'[')
    }

    fn end_array<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        self.close(out, b']')
    }

    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        self.item(out, first)
    }

    fn end_array_value<W: ?Sized + std::io::Write>(&mut self, _: &mut W) -> std::io::Result<()> {
        self.has_value = true;
        Ok(())
    }

    fn begin_object<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        self.open(out, b'{')
    }

    fn end_object<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        self.close(out, b'}')
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        self.item(out, first)
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
    ) -> std::io::Result<()> {
        out.write_all(self.key.as_bytes())
    }

    fn end_object_value<W: ?Sized + std::io::Write>(&mut self, _: &mut W) -> std::io::Result<()> {
        self.has_value = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use minijinja::context;

    fn render(source: &'static str) -> Result<String, Error> {
        let mut env = environment();
        env.add_template("t", source)?;
        let value = serde_json::json!({"b": [1, 2.5, "é<'>"], "a": {}, "n": null, "l": []});
        let value = Value::from(minijinja::value::Serde(&value));
        env.get_template("t")?.render(context! { value })
    }

    /// Expected values are what Python's json and Jinja2 print.
    #[test]
    fn values_print_as_in_python() {
        let cases = [
            ("{{ value | tojson }}", r#"{"b": [1, 2.5, "é<'>"], "a": {}, "n": null, "l": []}"#),
            (
                "{{ value | tojson(sort_keys=true, separators=(',', ':')) }}",
                r#"{"a":{},"b":[1,2.5,"é<'>"],"l":[],"n":null}"#,
            ),
            ("{{ 'é😀' | tojson(ensure_ascii=true) }}", r#""\u00e9\ud83d\ude00""#),
            (
                "{{ value | tojson(indent=2) }}",
                "{\n  \"b\": [\n    1,\n    2.5,\n    \"é<'>\"\n  ],\n  \"a\": {},\n  \
                 \"n\": null,\n  \"l\": []\n}",
            ),
            ("{{ true }} {{ none }} {{ missing }}|{{ 1 }}", "True None |1"),
            ("{{ '<b>' }}", "<b>"),
            ("{{ strftime_now('%Y') | int > 2000 }}", "True"),
        ];
        for (source, expected) in cases {
            assert_eq!(render(source).expect(source), expected, "{source}");
        }
    }

    #[test]
    fn a_raised_exception_keeps_its_words() {
        let error = render("{{ raise_exception('roles must alternate') }}").expect_err("raised");
        let source = std::error::Error::source(&error).expect("a source");
        assert_eq!(source.to_string(), "roles must alternate");
    }
}
