//! Reading one JSON object of a `config.json` so that no field goes unnoticed.
//!
//! Every getter marks its field as read; what nobody read is reported when the object is done.
//! It knows no family. Invariant: a number that leaves here is in a range whose products fit 64 bits.

use super::{ConfigError, Warning};
use serde_json::{Map, Value};
use std::collections::BTreeSet;

/// The largest width, count or size of one field; products of two widths fit 64 bits with room.
pub(super) const MAX_SIZE: u64 = 1 << 24;
/// The most routed experts; what the routers' fixed scratch holds.
pub(super) const MAX_EXPERTS: u64 = 1024;
/// The longest context a file may declare.
pub(super) const MAX_CONTEXT: u64 = 1 << 31;

/// One JSON object and the names already read from it.
pub(super) struct Fields<'a> {
    path: String,
    map: &'a Map<String, Value>,
    read: BTreeSet<String>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(path: &str, map: &'a Map<String, Value>) -> Self {
        Self { path: path.to_owned(), map, read: BTreeSet::new() }
    }

    /// The dotted name of `field` as an operator finds it in the file.
    pub(super) fn path(&self, field: &str) -> String {
        if self.path.is_empty() { field.to_owned() } else { format!("{}.{field}", self.path) }
    }

    /// The value of `field`; JSON null counts as absent, as it does for the library that wrote it.
    pub(super) fn value(&mut self, field: &str) -> Option<&'a Value> {
        self.read.insert(field.to_owned());
        self.map.get(field).filter(|value| !value.is_null())
    }

    /// Whether the file has `field` at all, be it null: for the few where null is a choice.
    pub(super) fn has(&self, field: &str) -> bool {
        self.map.contains_key(field)
    }

    /// The field is understood and has no bearing on inference.
    pub(super) fn ignore(&mut self, fields: &[&str]) {
        self.read.extend(fields.iter().map(|&field| field.to_owned()));
    }

    /// A refusal of what the file says in `field`.
    pub(super) fn refuse(&self, field: &str, supported: &str) -> ConfigError {
        ConfigError::Unsupported {
            field: self.path(field),
            value: self.map.get(field).map_or_else(|| "nothing".to_owned(), Value::to_string),
            supported: supported.to_owned(),
        }
    }

    pub(super) fn opt_number(
        &mut self,
        field: &str,
        min: u64,
        max: u64,
    ) -> Result<Option<u64>, ConfigError> {
        let Some(value) = self.value(field) else { return Ok(None) };
        match value.as_u64() {
            Some(number) if (min..=max).contains(&number) => Ok(Some(number)),
            _ => Err(self.refuse(field, &format!("an integer from {min} to {max}"))),
        }
    }

    /// A positive size.
    pub(super) fn opt_size(&mut self, field: &str) -> Result<Option<usize>, ConfigError> {
        Ok(self.opt_number(field, 1, MAX_SIZE)?.map(|n| n as usize))
    }

    /// A number of routed experts.
    pub(super) fn opt_experts(&mut self, field: &str) -> Result<Option<usize>, ConfigError> {
        Ok(self.opt_number(field, 1, MAX_EXPERTS)?.map(|n| n as usize))
    }

    /// A positive size with the family's default.
    pub(super) fn size_or(&mut self, field: &str, default: usize) -> Result<usize, ConfigError> {
        Ok(self.opt_size(field)?.unwrap_or(default))
    }

    /// A positive size that the file must give.
    pub(super) fn size(&mut self, field: &str) -> Result<usize, ConfigError> {
        self.opt_size(field)?.ok_or_else(|| ConfigError::Missing { field: self.path(field) })
    }

    /// A count that may be zero, with the family's default.
    pub(super) fn count_or(&mut self, field: &str, default: usize) -> Result<usize, ConfigError> {
        Ok(self.opt_number(field, 0, MAX_SIZE)?.map_or(default, |n| n as usize))
    }

    pub(super) fn opt_float(&mut self, field: &str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.value(field) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if number.is_finite() => Ok(Some(number)),
            _ => Err(self.refuse(field, "a finite number")),
        }
    }

    /// A number above zero, with the family's default.
    pub(super) fn positive_or(&mut self, field: &str, default: f64) -> Result<f64, ConfigError> {
        match self.opt_float(field)? {
            None => Ok(default),
            Some(number) if number > 0.0 => Ok(number),
            Some(_) => Err(self.refuse(field, "a number above zero")),
        }
    }

    /// A number above zero that the file must give.
    pub(super) fn positive(&mut self, field: &str) -> Result<f64, ConfigError> {
        match self.opt_float(field)? {
            Some(number) if number > 0.0 => Ok(number),
            Some(_) => Err(self.refuse(field, "a number above zero")),
            None => Err(ConfigError::Missing { field: self.path(field) }),
        }
    }

    pub(super) fn bool_or(&mut self, field: &str, default: bool) -> Result<bool, ConfigError> {
        match self.value(field) {
            None => Ok(default),
            Some(Value::Bool(value)) => Ok(*value),
            Some(_) => Err(self.refuse(field, "true or false")),
        }
    }

    pub(super) fn text(&mut self, field: &str) -> Result<Option<&'a str>, ConfigError> {
        match self.value(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.refuse(field, "a string")),
        }
    }

    pub(super) fn object(
        &mut self,
        field: &str,
    ) -> Result<Option<&'a Map<String, Value>>, ConfigError> {
        match self.value(field) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(_) => Err(self.refuse(field, "an object")),
        }
    }

    /// A field that may only hold `only` (or be absent): anything else changes the result.
    pub(super) fn only(&mut self, field: &str, only: &Value) -> Result<(), ConfigError> {
        match self.value(field) {
            None => Ok(()),
            Some(value) if value == only => Ok(()),
            // 1 and 1.0 are the same number in a configuration.
            Some(value) if value.as_f64().is_some() && value.as_f64() == only.as_f64() => Ok(()),
            Some(_) => Err(self.refuse(field, &only.to_string())),
        }
    }

    /// What the file holds that nobody read.
    pub(super) fn unread(self) -> Vec<Warning> {
        let unread = self.map.keys().filter(|key| !self.read.contains(*key));
        unread
            .map(|key| Warning { field: self.path(key), value: self.map[key].to_string() })
            .collect()
    }
}
