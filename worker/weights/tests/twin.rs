//! The parity tests' numpy generator and this crate's make the same bits: the parity goldens stand on
//! it.

#![allow(clippy::unwrap_used, reason = "a test panics when what it set up is not there")]

use serde::Deserialize;
use std::fs;
use weights::progress::Silent;
use weights::random::{Law, Profile, RandomModel, TensorSpec};
use weights::{Dtype, Slice, Weights};

/// A case of `generator.json`, which `make_goldens.py` writes.
#[derive(Deserialize)]
struct Case {
    seed: u64,
    name: String,
    shape: Vec<usize>,
    mean: f64,
    std: f64,
    /// Hexadecimal bits of the first elements.
    bits: Vec<String>,
}

fn bits(model: &RandomModel, spec: &TensorSpec) -> Vec<u32> {
    let made = Weights::random(model, std::slice::from_ref(spec), 2, &Silent).unwrap();
    let Slice::F32(values) = made.get(&spec.name).unwrap().data else { panic!("not F32") };
    values.iter().map(|value| value.to_bits()).collect()
}

fn parity(seed: u64, tied_embeddings: bool) -> RandomModel {
    RandomModel { seed, profile: Profile::Parity, tied_embeddings }
}

#[test]
fn the_written_cases_are_met() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../control-plane/tokenmill/tests/parity/generator.json"
    );
    let cases: Vec<Case> = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    assert!(!cases.is_empty());
    for Case { seed, name, shape, mean, std, bits: expected } in cases {
        let model = parity(seed, false);
        let spec = TensorSpec { name, shape, dtype: Dtype::F32 };
        let Ok(Law::Normal { mean: m, std: s }) = model.law(&spec) else { panic!("{}", spec.name) };
        // JSON numbers are read to the last bit but one; the elements' bits are exact.
        assert!(m == mean && (s / std - 1.0).abs() < 1e-15, "{}: {m} {s}", spec.name);
        let made: Vec<String> =
            bits(&model, &spec).iter().take(expected.len()).map(|b| format!("{b:08x}")).collect();
        assert_eq!(made, expected, "{}", spec.name);
    }
}

/// Every element and every rule, by `weights.bits_sum` of one tensor each.
#[test]
fn whole_tensors_sum_to_the_twins_bits() {
    let cases: [(&str, &[usize], bool, u64); 5] = [
        ("model.embed_tokens.weight", &[101, 33], true, 7_075_428_528_100),
        ("model.layers.0.mlp.gate.weight", &[7, 33], false, 507_524_559_019),
        ("model.layers.0.mlp.gate.e_score_correction_bias", &[7], false, 18_008_957_132),
        ("model.norm.weight", &[33], false, 35_127_260_386),
        ("model.layers.3.self_attn.o_proj.weight", &[33, 65], false, 4_549_266_832_259),
    ];
    for (name, shape, tied, expected) in cases {
        let spec = TensorSpec { name: name.into(), shape: shape.to_vec(), dtype: Dtype::F32 };
        let sum: u64 = bits(&parity(5, tied), &spec).into_iter().map(u64::from).sum();
        assert_eq!(sum, expected, "{name}");
    }
}
