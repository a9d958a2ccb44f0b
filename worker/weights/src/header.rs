//! The header of one safetensors file: eight bytes of length, then JSON that gives each tensor's
//! type, shape and place.
//!
//! Types and the shape of an entry are the `safetensors` crate's. The checks are made here, because
//! a refusal has to name tensor and offset, and because a repeated name must not pass; the tests
//! hold that every file accepted here is accepted by the crate's own reader too.
//!
//! Invariant: the tensors returned tile the data section exactly, each as long as its shape and
//! type say.

use crate::error::Defect;
use safetensors::tensor::{Dtype, TensorInfo};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;

/// Longest header that is read, in bytes; the format's own limit.
pub(crate) const MAX_HEADER: u64 = 100_000_000;
/// The header starts behind its length.
const LENGTH_BYTES: u64 = 8;

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Place in the file, from its start.
    pub bytes: Range<usize>,
}

/// Reads and checks the header of a file given whole. Entries come in the order of their data.
pub(crate) fn parse(file: &[u8]) -> Result<Vec<Entry>, Defect> {
    let len = file.len() as u64;
    let Some((prefix, rest)) = file.split_first_chunk::<8>() else {
        return Err(Defect::NoHeader { len });
    };
    let header = u64::from_le_bytes(*prefix);
    let json = usize::try_from(header)
        .ok()
        .filter(|_| header <= MAX_HEADER)
        .and_then(|header| rest.get(..header))
        .ok_or(Defect::HeaderLength { header, len, limit: MAX_HEADER })?;
    let Header(tensors) = serde_json::from_slice(json).map_err(|reason| Defect::Json {
        at: LENGTH_BYTES,
        what: "safetensors header",
        reason,
    })?;
    let data = LENGTH_BYTES + header;
    let mut entries: Vec<(String, TensorInfo)> = tensors.into_iter().collect();
    entries.sort_by_key(|(_, info)| info.data_offsets);
    let mut end = data;
    let mut checked = Vec::with_capacity(entries.len());
    for (name, TensorInfo { dtype, shape, data_offsets }) in entries {
        let place = |offset: usize| data.saturating_add(offset as u64);
        let bytes = place(data_offsets.0)..place(data_offsets.1);
        if byte_len(dtype, &shape) != bytes.end.checked_sub(bytes.start) {
            return Err(Defect::Extent { tensor: name, dtype, shape, bytes });
        }
        if bytes.start != end {
            return Err(Defect::Layout { tensor: name, expected: end, found: bytes.start });
        }
        if bytes.end > len {
            return Err(Defect::PastEnd { tensor: name, bytes, len });
        }
        end = bytes.end;
        // Both ends are at most the length of a slice, so they fit.
        let bytes = bytes.start as usize..bytes.end as usize;
        checked.push(Entry { name, dtype, shape, bytes });
    }
    if end != len {
        return Err(Defect::Trailing { end, len });
    }
    Ok(checked)
}

/// Bytes that a shape takes; none where it overflows or ends within a byte.
pub(crate) fn byte_len(dtype: Dtype, shape: &[usize]) -> Option<u64> {
    let bits = shape.iter().try_fold(dtype.bitsize() as u64, |bits, &dim| {
        bits.checked_mul(u64::try_from(dim).ok()?)
    })?;
    (bits % 8 == 0).then_some(bits / 8)
}

/// The JSON of a header, without its free-form `__metadata__`.
struct Header(BTreeMap<String, TensorInfo>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut tensors = BTreeMap::new();
                let mut metadata = None;
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        let text: BTreeMap<String, String> = map.next_value()?;
                        if metadata.replace(text).is_some() {
                            return Err(A::Error::custom("`__metadata__` stands twice"));
                        }
                        continue;
                    }
                    let info = map
                        .next_value()
                        .map_err(|e| A::Error::custom(format_args!("tensor `{name}`: {e}")))?;
                    if tensors.contains_key(&name) {
                        return Err(A::Error::custom(format_args!("tensor `{name}` stands twice")));
                    }
                    tensors.insert(name, info);
                }
                Ok(Header(tensors))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// `model.safetensors.index.json`: which file holds which tensor.
#[derive(Deserialize)]
pub(crate) struct Index {
    /// File by tensor, each tensor once.
    #[serde(deserialize_with = "unique")]
    pub weight_map: BTreeMap<String, String>,
}

impl Index {
    pub(crate) fn parse(text: &[u8]) -> Result<Self, Defect> {
        let index: Self = serde_json::from_slice(text).map_err(|reason| Defect::Json {
            at: 0,
            what: "safetensors index with a weight_map",
            reason,
        })?;
        match index.weight_map.iter().find(|(_, file)| !is_plain(file)) {
            Some((tensor, target)) => {
                Err(Defect::Escape { tensor: tensor.clone(), target: target.clone() })
            }
            None => Ok(index),
        }
    }

    /// The files named, each once, in the order of their names.
    pub(crate) fn files(&self) -> BTreeSet<&str> {
        self.weight_map.values().map(String::as_str).collect()
    }
}

/// Whether a name stays in its folder on every system: no separator, no drive, no dot file.
fn is_plain(file: &str) -> bool {
    let stem = file.strip_suffix(".safetensors").unwrap_or_default();
    !stem.is_empty()
        && !stem.starts_with('.')
        && !stem.contains(|c: char| c.is_control() || matches!(c, '/' | '\\' | ':'))
}

fn unique<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<BTreeMap<String, String>, D::Error> {
    struct Unique;
    impl<'de> Visitor<'de> for Unique {
        type Value = BTreeMap<String, String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object of file names by tensor")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut files = BTreeMap::new();
            while let Some((tensor, file)) = map.next_entry::<String, String>()? {
                if files.contains_key(&tensor) {
                    return Err(A::Error::custom(format_args!("tensor `{tensor}` stands twice")));
                }
                files.insert(tensor, file);
            }
            Ok(files)
        }
    }
    deserializer.deserialize_map(Unique)
}
