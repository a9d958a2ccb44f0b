//! Random weights that a device makes for itself: what draws each matrix instead of its values.
//!
//! Vectors, and matrices whose elements depend on each other, are small and made here. Invariant: a
//! device that follows [`Draws`] holds the bits that [`Weights::random`] would have made.

use super::{Generator, Law, RandomError, RandomModel, TensorSpec};
use crate::progress::Silent;
use crate::set::{Float, Weights};
use std::collections::BTreeMap;

/// Independent normal draws: element `i` is `mean + std * generator.normal(i)` in double precision,
/// rounded to single precision, then to `float`.
#[derive(Clone, Copy, Debug)]
pub struct Draws {
    /// Of the tensor.
    pub generator: Generator,
    /// Mean.
    pub mean: f64,
    /// Standard deviation.
    pub std: f64,
    /// The type that a checkpoint would store them in.
    pub float: Float,
}

/// A matrix by what draws it.
#[derive(Clone, Debug)]
pub struct DrawnMatrix {
    /// Rows and columns.
    pub shape: Vec<usize>,
    /// How.
    pub draws: Draws,
}

/// Random weights of one model, most of them not made.
#[derive(Debug)]
pub struct RandomWeights {
    drawn: BTreeMap<String, DrawnMatrix>,
    made: Weights,
}

impl RandomWeights {
    /// Takes the tensors listed, and makes those that a device cannot.
    ///
    /// # Errors
    /// The first tensor that cannot be made.
    pub fn new(
        model: &RandomModel,
        specs: &[TensorSpec],
        threads: usize,
    ) -> Result<Self, RandomError> {
        let mut drawn = BTreeMap::new();
        let mut rest = Vec::new();
        for spec in specs {
            spec.byte_len()?;
            match model.law(spec)? {
                Law::Normal { mean, std } if spec.shape.len() > 1 => {
                    let generator = Generator::new(model.seed, &spec.name);
                    let draws = Draws { generator, mean, std, float: spec.float()? };
                    let matrix = DrawnMatrix { shape: spec.shape.clone(), draws };
                    drawn.insert(spec.name.clone(), matrix);
                }
                Law::Normal { .. } | Law::Constant(_) | Law::Router { .. } => {
                    rest.push(spec.clone());
                }
            }
        }
        Ok(Self { drawn, made: Weights::random(model, &rest, threads, &Silent)? })
    }

    /// A matrix that is to be drawn; none where it is among [`RandomWeights::made`].
    #[must_use]
    pub fn drawn(&self, name: &str) -> Option<&DrawnMatrix> {
        self.drawn.get(name)
    }

    /// Everything else.
    #[must_use]
    pub const fn made(&self) -> &Weights {
        &self.made
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Profile;
    use crate::slice::Slice;
    use safetensors::Dtype;

    #[test]
    fn what_is_drawn_and_what_is_made_are_the_weights() {
        let specs: Vec<TensorSpec> = [
            ("a.mlp.up_proj.weight", vec![5, 7], Dtype::BF16),
            ("a.mlp.gate.weight", vec![3, 7], Dtype::BF16),
            ("a.norm.weight", vec![7], Dtype::F32),
            ("lm_head.weight", vec![9, 7], Dtype::F16),
        ]
        .map(|(name, shape, dtype)| TensorSpec { name: name.to_owned(), shape, dtype })
        .into();
        for profile in [Profile::Realistic, Profile::Parity] {
            let model = RandomModel { seed: 3, profile, tied_embeddings: false };
            let all = Weights::random(&model, &specs, 1, &Silent).expect("weights");
            let source = RandomWeights::new(&model, &specs, 1).expect("weights");
            for spec in &specs {
                let name = spec.name.as_str();
                let expected = all.get(name).expect("made");
                let Some(DrawnMatrix { shape, draws }) = source.drawn(name) else {
                    let made = source.made().get(name).expect("made here");
                    assert_eq!((made.shape, made.data), (expected.shape, expected.data), "{name}");
                    continue;
                };
                assert!(source.made().get(name).is_none(), "{name} is there twice");
                assert_eq!(shape, expected.shape);
                let single = |i| (draws.mean + draws.std * draws.generator.normal(i as u64)) as f32;
                let same = match expected.data {
                    Slice::F32(data) => (0..).zip(data).all(|(i, x)| *x == single(i)),
                    Slice::Bf16(data) => {
                        (0..).zip(data).all(|(i, x)| *x == half::bf16::from_f32(single(i)))
                    }
                    Slice::F16(data) => {
                        (0..).zip(data).all(|(i, x)| *x == half::f16::from_f32(single(i)))
                    }
                };
                assert!(same && draws.float == Float::of(spec.dtype).expect("a float"), "{name}");
            }
            assert!(source.drawn("a.mlp.up_proj.weight").is_some());
            assert_eq!(source.drawn("a.mlp.gate.weight").is_some(), profile == Profile::Parity);
        }
    }

    #[test]
    fn what_cannot_be_made_is_refused() {
        let model = RandomModel { seed: 3, profile: Profile::Realistic, tied_embeddings: false };
        let spec = |name: &str, dtype| TensorSpec { name: name.into(), shape: vec![2, 2], dtype };
        let refused = |spec| RandomWeights::new(&model, &[spec], 1).expect_err("refused");
        assert!(matches!(refused(spec("a", Dtype::F32)), RandomError::NoLaw { .. }));
        assert!(matches!(refused(spec("a.weight", Dtype::I8)), RandomError::Dtype { .. }));
    }
}
