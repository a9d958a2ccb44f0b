//! Parts of tensors: the elements of the whole, and nothing else of the file.

#![allow(clippy::unwrap_used, reason = "a test panics when what it set up is not there")]

mod common;

use common::{f32s, tensors};
use std::fs;
use weights::progress::Silent;
use weights::random::{Profile, RandomModel, TensorSpec};
use weights::{Checkpoint, CheckpointError, Dtype, Float, LoadOptions, Part, Slice, Weights};

const ROWS: usize = 9;
const COLS: usize = 7;

fn value(row: usize, col: usize) -> f32 {
    (row * 16 + col) as f32 - 40.0
}

/// A matrix `[9, 7]` of singles, one of codes in blocks of 4 x 3, and a vector.
fn checkpoint() -> (tempfile::TempDir, Checkpoint) {
    let whole: Vec<f32> = (0..ROWS * COLS).map(|at| value(at / COLS, at % COLS)).collect();
    let mut codes = vec![0x38; ROWS * COLS];
    codes[5 * COLS + 6] = 0x7F;
    let scales: Vec<f32> = (1..=9).map(|scale| scale as f32).collect();
    let dir = tempfile::tempdir().unwrap();
    let file = tensors(&[
        ("m.weight", "F32", &[ROWS, COLS], &f32s(&whole)),
        ("q.weight", "F8_E4M3", &[ROWS, COLS], &codes),
        ("q.weight_scale_inv", "F32", &[3, 3], &f32s(&scales)),
        ("v.bias", "F32", &[ROWS], &f32s(&whole[..ROWS])),
    ]);
    fs::write(dir.path().join("model.safetensors"), file).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    (dir, checkpoint)
}

fn options(matrices: Option<Float>) -> LoadOptions {
    LoadOptions { matrices, fp8_block: Some((4, 3)), ..LoadOptions::default() }
}

fn matrix(name: &str, rows: std::ops::Range<usize>, cols: std::ops::Range<usize>) -> Part {
    Part::new(name.to_owned(), vec![ROWS, COLS], rows, cols)
}

#[test]
fn every_part_has_the_elements_of_the_whole() {
    let (_dir, checkpoint) = checkpoint();
    for rows in [0..ROWS, 0..1, 3..8, 4..4] {
        for cols in [0..COLS, 0..3, 2..7, 5..6] {
            for to in [None, Some(Float::F32), Some(Float::Bf16)] {
                let part = matrix("m.weight", rows.clone(), cols.clone());
                let load = Weights::load_parts(&checkpoint, &[part], &options(to), &Silent);
                let weights = load.unwrap();
                let got = weights.get("m.weight").unwrap();
                assert_eq!(got.shape, [rows.len(), cols.len()]);
                let expected: Vec<f32> = rows
                    .clone()
                    .flat_map(|row| cols.clone().map(move |col| value(row, col)))
                    .collect();
                assert_eq!(got.data.to_f32(), expected, "{rows:?} {cols:?} {to:?}");
                let bytes = if to == Some(Float::Bf16) { 2 } else { 4 } * expected.len() as u64;
                assert_eq!(weights.held_bytes(), bytes);
                let lies = cols.len() == COLS && to != Some(Float::Bf16);
                assert_eq!(weights.made_bytes(), if lies { 0 } else { bytes });
                assert_eq!(weights.stored("m.weight").is_some(), lies);
            }
        }
    }
    let part = Part::new("v.bias".to_owned(), vec![ROWS], 2..5, 0..1);
    let weights = Weights::load_parts(&checkpoint, &[part], &options(None), &Silent).unwrap();
    let got = weights.get("v.bias").unwrap();
    assert_eq!((got.shape, got.data), (&[3][..], Slice::F32(&[-38.0, -37.0, -36.0])));
}

#[test]
fn codes_are_scaled_by_their_place_in_the_whole() {
    let (_dir, checkpoint) = checkpoint();
    let load = |rows, cols| {
        let part = matrix("q.weight", rows, cols);
        Weights::load_parts(&checkpoint, &[part], &options(Some(Float::F32)), &Silent)
    };
    let (rows, cols) = (3..9, 1..6);
    let weights = load(rows.clone(), cols.clone()).unwrap();
    let scale = |row: usize, col: usize| (row / 4 * 3 + col / 3 + 1) as f32;
    let expected: Vec<f32> =
        rows.flat_map(|row| cols.clone().map(move |col| scale(row, col))).collect();
    assert_eq!(weights.get("q.weight").unwrap().data.to_f32(), expected);
    // The code that is no number is another part's to refuse.
    assert!(load(0..5, 0..COLS).is_ok());
    let refused = load(4..6, 5..7);
    assert!(matches!(refused, Err(CheckpointError::Damaged { .. })), "{refused:?}");
    assert!(refused.unwrap_err().to_string().contains(&format!("{}", 5 * COLS + 6)));
}

#[test]
fn a_part_is_held_to_the_whole_shape() {
    let (_dir, checkpoint) = checkpoint();
    let part = Part::new("m.weight".to_owned(), vec![ROWS + 1, COLS], 0..2, 0..2);
    let refused = Weights::load_parts(&checkpoint, &[part], &options(None), &Silent);
    assert!(matches!(refused, Err(CheckpointError::WrongShape { .. })));
}

#[test]
fn parts_of_random_tensors_have_the_bits_of_the_whole() {
    let shape = vec![40, 36];
    for (name, profile) in [
        ("a.up_proj.weight", Profile::Parity),
        ("a.mlp.gate.weight", Profile::Realistic),
        ("a.norm.weight", Profile::Parity),
    ] {
        let shape = if name.contains("norm") { vec![40] } else { shape.clone() };
        let model = RandomModel { seed: 9, profile, tied_embeddings: false };
        let spec = TensorSpec { name: name.to_owned(), shape: shape.clone(), dtype: Dtype::BF16 };
        let whole = Weights::random(&model, &[spec], 2, &Silent).unwrap();
        let all = whole.get(name).unwrap().data.to_f32();
        let width = if shape.len() == 1 { 1 } else { 36 };
        for (rows, cols) in [(0..40, 0..width), (11..30, 0..width), (7..9, width / 2..width)] {
            let part = Part::new(name.to_owned(), shape.clone(), rows.clone(), cols.clone());
            let parts = [(part, Dtype::BF16)];
            let got = Weights::random_parts(&model, &parts, 2, &Silent).unwrap();
            let expected: Vec<f32> = rows
                .flat_map(|row| cols.clone().map(move |col| row * width + col))
                .map(|at| all[at])
                .collect();
            assert_eq!(got.get(name).unwrap().data.to_f32(), expected, "{name}");
            assert_eq!(got.held_bytes() as usize, expected.len() * 2);
        }
    }
}
