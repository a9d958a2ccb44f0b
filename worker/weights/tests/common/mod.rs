//! Safetensors files built byte by byte, so that tests can build wrong ones.

use std::fs;
use std::path::Path;

/// A file of a header and data, with the length in front that the header has.
pub(crate) fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// A well-formed file of tensors (name, dtype, shape, bytes), its data aligned to eight bytes.
pub(crate) fn tensors(list: &[(&str, &str, &[usize], &[u8])]) -> Vec<u8> {
    let mut data = Vec::new();
    let mut entries = Vec::new();
    for (name, dtype, shape, bytes) in list {
        let start = data.len();
        data.extend_from_slice(bytes);
        let offsets = [start, data.len()];
        entries.push(format!(
            r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":{offsets:?}}}"#
        ));
    }
    let mut header = format!("{{{}}}", entries.join(","));
    while header.len() % 8 != 0 {
        header.push(' ');
    }
    file(&header, &data)
}

/// Little-endian bytes of singles.
pub(crate) fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Writes the index of a sharded checkpoint.
#[allow(dead_code, reason = "each test file uses its part of this module")]
pub(crate) fn write_index(dir: &Path, map: &[(&str, &str)]) {
    let entries: Vec<String> = map.iter().map(|(t, f)| format!(r#""{t}":"{f}""#)).collect();
    let text = format!(r#"{{"metadata":{{}},"weight_map":{{{}}}}}"#, entries.join(","));
    fs::write(dir.join("model.safetensors.index.json"), text).expect("a writable folder");
}
