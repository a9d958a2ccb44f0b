//! Damaged files at random: opening never panics, accepts nothing that the safetensors crate's own
//! reader refuses, and gives only bytes of the file.

#![allow(clippy::unwrap_used, reason = "a test panics when what it set up is not there")]

mod common;

use common::{f32s, tensors};
use proptest::prelude::*;
use safetensors::SafeTensors;
use std::fs;
use weights::Checkpoint;

fn good() -> Vec<u8> {
    tensors(&[
        ("model.embed_tokens.weight", "F32", &[2, 3], &f32s(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])),
        ("model.norm.weight", "BF16", &[4], &[1, 2, 3, 4, 5, 6, 7, 8]),
        ("empty", "F8_E4M3", &[0, 5], &[]),
        ("lm_head.weight", "F16", &[1, 2], &[9, 9, 9, 9]),
    ])
}

/// Opens the bytes as a checkpoint and compares the verdict with the other reader's.
fn judge(bytes: &[u8]) -> Result<bool, TestCaseError> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    let Ok(checkpoint) = Checkpoint::open(dir.path()) else { return Ok(false) };
    let other = SafeTensors::deserialize(bytes);
    prop_assert!(other.is_ok(), "accepted here, but not there: {:?}", other.err());
    let other = other.unwrap();
    prop_assert_eq!(checkpoint.tensors().len(), other.len());
    for ours in checkpoint.tensors() {
        let theirs = other.tensor(ours.name).unwrap();
        prop_assert_eq!(ours.bytes, theirs.data());
        prop_assert_eq!(ours.shape, theirs.shape());
        prop_assert_eq!(ours.dtype, theirs.dtype());
        prop_assert_eq!(&bytes[ours.offset..ours.offset + ours.bytes.len()], ours.bytes);
    }
    Ok(true)
}

#[test]
fn the_unharmed_file_is_accepted() {
    assert!(judge(&good()).unwrap());
}

/// What a careless or hostile writer would put in the place of a number or a name.
fn fragment() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<u64>().prop_map(|n| n.to_string()),
        (0u64..64).prop_map(|n| n.to_string()),
        any::<i32>().prop_map(|n| n.to_string()),
        Just("18446744073709551615".to_owned()),
        Just("1e400".to_owned()),
        Just("null".to_owned()),
        Just("[]".to_owned()),
        Just("[[".repeat(200)),
        Just("\"F32\"".to_owned()),
        Just("\"BOOL\"".to_owned()),
        Just("{\"__metadata__\":{}}".to_owned()),
        "[ -~]{0,12}",
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn bytes_replaced(places in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let mut bytes = good();
        for (place, byte) in places {
            let at = place.index(bytes.len());
            bytes[at] = byte;
        }
        judge(&bytes)?;
    }

    #[test]
    fn cut_or_grown(cut in any::<prop::sample::Index>(), more in prop::collection::vec(any::<u8>(), 0..9)) {
        let mut bytes = good();
        let whole = bytes.len();
        bytes.truncate(cut.index(whole + 1));
        bytes.extend_from_slice(&more);
        let accepted = judge(&bytes)?;
        // A file of another length than its header says is never accepted.
        prop_assert!(!accepted || bytes.len() == whole);
    }

    /// A run of digits or a string of the header becomes something else, and the length in front is
    /// kept right, so that the parser and not the length check is what is tested.
    #[test]
    fn header_values_replaced(place in any::<prop::sample::Index>(), with in fragment()) {
        let bytes = good();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header = std::str::from_utf8(&bytes[8..8 + length]).unwrap();
        let starts: Vec<usize> = header.char_indices()
            .filter(|&(i, c)| c.is_ascii_digit() || (c == '"' && i > 0))
            .map(|(i, _)| i)
            .collect();
        let start = starts[place.index(starts.len())];
        let run = header[start..].bytes().take_while(u8::is_ascii_digit).count().max(1);
        let header = format!("{}{with}{}", &header[..start], &header[start + run..]);
        judge(&common::file(&header, &bytes[8 + length..]))?;
    }

    #[test]
    fn index_text_replaced(place in any::<prop::sample::Index>(), with in fragment()) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("model.safetensors"), good()).unwrap();
        let index = r#"{"metadata":{"total_size":1},"weight_map":{"empty":"model.safetensors"}}"#;
        let at = place.index(index.len());
        let text = format!("{}{with}{}", &index[..at], &index[at + 1..]);
        fs::write(dir.path().join("model.safetensors.index.json"), text).unwrap();
        // The index leaves three tensors out, so whatever it became, it is refused.
        prop_assert!(Checkpoint::open(dir.path()).is_err());
    }
}
