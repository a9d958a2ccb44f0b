//! A request's JSON object as named raw values.
//!
//! Only the top level is taken apart at first: a value costs no more memory than its text until a
//! field is asked for by name and type. So a body cannot grow while it is parsed, every type error
//! knows its field, and what nobody asked for is left over to be judged by the policy. Of equal
//! keys the last wins; null is absence.

use crate::error::ApiError;
use crate::limits::{MAX_FIELDS, MAX_JSON_DEPTH};
use axum::http::StatusCode;
use serde::de::{DeserializeOwned, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use std::ops::RangeInclusive;

/// Fields of one object, not yet typed.
pub(crate) struct Fields<'a> {
    values: BTreeMap<String, &'a RawValue>,
}

impl<'a> Fields<'a> {
    /// Takes the top level apart.
    ///
    /// # Errors
    /// When the body is no UTF-8, no JSON (with the byte where it stops being JSON), nested too
    /// deeply, or no object.
    pub(crate) fn parse(body: &'a [u8]) -> Result<Self, ApiError> {
        let text = std::str::from_utf8(body).map_err(|error| {
            invalid_json(error.valid_up_to(), "the body is not valid UTF-8".to_owned())
        })?;
        if let Some(offset) = too_deep(body) {
            let message =
                format!("the body is nested deeper than {MAX_JSON_DEPTH} levels at byte {offset}");
            return Err(ApiError::new(StatusCode::BAD_REQUEST, "json_too_deep", message));
        }
        let values = serde_json::from_str::<Object<'a>>(text).map_err(|error| {
            let offset = offset_of(body, error.line(), error.column());
            if error.is_data() {
                return ApiError::new(
                    StatusCode::BAD_REQUEST,
                    "invalid_request",
                    format!("the body must be a JSON object: {error}"),
                );
            }
            invalid_json(offset, format!("the body is not valid JSON: {error}"))
        })?;
        Ok(Self { values: values.0 })
    }

    /// The value of a field, which then counts as known.
    pub(crate) fn raw(&mut self, name: &str) -> Option<&'a str> {
        self.values.remove(name).map(RawValue::get).filter(|text| *text != "null")
    }

    /// A field of type `T`, which is `expected` in words.
    pub(crate) fn take<T: DeserializeOwned>(
        &mut self,
        name: &'static str,
        expected: &str,
    ) -> Result<Option<T>, ApiError> {
        self.raw(name).map(|text| typed(name, text, expected)).transpose()
    }

    /// A truth value; false when absent.
    pub(crate) fn flag(&mut self, name: &'static str) -> Result<bool, ApiError> {
        Ok(self.take(name, "true or false")?.unwrap_or(false))
    }

    /// A finite number. Its range is checked by whoever knows it.
    pub(crate) fn number(&mut self, name: &'static str) -> Result<Option<f32>, ApiError> {
        self.take(name, "a number")
    }

    /// An integer in `range`.
    pub(crate) fn integer(
        &mut self,
        name: &'static str,
        range: RangeInclusive<i64>,
    ) -> Result<Option<i64>, ApiError> {
        let Some(text) = self.raw(name) else { return Ok(None) };
        match serde_json::from_str::<i64>(text) {
            Ok(value) if range.contains(&value) => Ok(Some(value)),
            _ => {
                let message = format!(
                    "{name} must be an integer between {} and {}, got {}",
                    range.start(),
                    range.end(),
                    excerpt(text)
                );
                Err(ApiError::invalid(name, message))
            }
        }
    }

    /// What nobody asked for.
    pub(crate) fn rest(self) -> impl Iterator<Item = (String, &'a str)> {
        self.values.into_iter().map(|(name, value)| (name, value.get()))
    }
}

/// `text` as a `T`, or 400 naming the field.
pub(crate) fn typed<T: DeserializeOwned>(
    name: impl Into<std::borrow::Cow<'static, str>>,
    text: &str,
    expected: &str,
) -> Result<T, ApiError> {
    serde_json::from_str(text).map_err(|error| {
        let name = name.into();
        let message = format!("{name} must be {expected}, got {} ({error})", excerpt(text));
        ApiError::invalid(name, message)
    })
}

/// The beginning of what a client sent, for a message.
pub(crate) fn excerpt(text: &str) -> &str {
    const QUOTED_BYTES: usize = 80;
    &text[..text.floor_char_boundary(QUOTED_BYTES)]
}

fn invalid_json(offset: usize, what: String) -> ApiError {
    let message = format!("{what} (byte {offset})");
    ApiError::new(StatusCode::BAD_REQUEST, "invalid_json", message)
}

/// serde_json counts lines from 1 and bytes in a line from 1; zero means before the first.
fn offset_of(body: &[u8], line: usize, column: usize) -> usize {
    let before: usize =
        body.split_inclusive(|b| *b == b'\n').take(line.saturating_sub(1)).map(<[u8]>::len).sum();
    (before + column.saturating_sub(1)).min(body.len())
}

/// Where brackets outside of strings nest too deeply. Runs before the parser, which would not
/// notice in values that are only passed over.
fn too_deep(body: &[u8]) -> Option<usize> {
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    for (offset, byte) in body.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => {
                depth += 1;
                if depth > MAX_JSON_DEPTH {
                    return Some(offset);
                }
            }
            b'}' | b']' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    None
}

struct Object<'a>(BTreeMap<String, &'a RawValue>);

impl<'de> serde::Deserialize<'de> for Object<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Object<'de>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut values = BTreeMap::new();
                while let Some((name, value)) = map.next_entry::<String, &'de RawValue>()? {
                    values.insert(name, value);
                    if values.len() > MAX_FIELDS {
                        return Err(A::Error::custom(format_args!(
                            "more than {MAX_FIELDS} fields"
                        )));
                    }
                }
                Ok(Object(values))
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_offset_is_where_json_ends() {
        let cases: [(&[u8], usize); 5] =
            [(b"", 0), (b"{\"a\":}", 5), (b"{\n\"a\" 1}", 6), (b"{} x", 3), (b"{\"a\":NaN}", 5)];
        for (body, offset) in cases {
            let error = Fields::parse(body).err().expect("refused");
            assert_eq!(error.code, Some("invalid_json"));
            let found = error.message.rsplit_once("(byte ").expect("an offset").1;
            assert_eq!(found, format!("{offset})"), "{}", String::from_utf8_lossy(body));
        }
    }

    #[test]
    fn depth_counts_brackets_outside_of_strings_only() {
        let deep = |n: usize| format!("{{\"a\":{}{}}}", "[".repeat(n), "]".repeat(n));
        assert!(Fields::parse(deep(MAX_JSON_DEPTH - 1).as_bytes()).is_ok());
        let error = Fields::parse(deep(100_000).as_bytes()).err().expect("refused");
        assert_eq!(error.code, Some("json_too_deep"));
        let text = format!("{{\"a\":\"\\\"{}\"}}", "[".repeat(1_000));
        assert!(Fields::parse(text.as_bytes()).is_ok());
    }

    #[test]
    fn the_last_of_equal_keys_wins_and_null_is_absence() {
        let mut fields = Fields::parse(b"{\"n\":1,\"n\":2,\"m\":null}").expect("valid");
        assert_eq!(fields.integer("n", 1..=9), Ok(Some(2)));
        assert_eq!(fields.integer("m", 1..=9), Ok(None));
    }
}
