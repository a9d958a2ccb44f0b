//! Values put into memory: a law applied to a range of a tensor's elements, in the type that is stored.
//!
//! It starts no thread. Invariant: filling a tensor in any pieces gives the bits of filling it whole.

use super::{Generator, Law, RandomError, RandomModel, TensorSpec, router};
use crate::slice::Element;

/// Values made at once, small enough for the first-level cache.
const BATCH: usize = 1024;

/// The values of one tensor, ready to be made.
#[derive(Clone, Debug)]
pub(crate) struct Fill {
    generator: Generator,
    values: Values,
}

#[derive(Clone, Debug)]
enum Values {
    Normal { mean: f64, std: f64 },
    Constant(f32),
    Listed(Vec<f64>),
}

impl Fill {
    /// The values of a tensor of a model; for a router under [`super::Profile::Realistic`] this
    /// makes the whole of it, eight bytes an element.
    ///
    /// # Errors
    /// [`RandomError::NoLaw`].
    pub(crate) fn new(model: &RandomModel, spec: &TensorSpec) -> Result<Self, RandomError> {
        let generator = Generator::new(model.seed, &spec.name);
        let values = match model.law(spec)? {
            Law::Normal { mean, std } => Values::Normal { mean, std },
            Law::Constant(value) => Values::Constant(value as f32),
            Law::Router { experts, hidden } => {
                Values::Listed(router::orthonormal_rows(generator, experts, hidden))
            }
        };
        Ok(Self { generator, values })
    }

    /// Makes elements `start..start + out.len()`, row-major.
    ///
    /// # Panics
    /// For a router, where the range leaves the tensor.
    pub(crate) fn fill<T: Element>(&self, start: usize, out: &mut [T]) {
        match &self.values {
            Values::Normal { mean, std } => {
                let mut singles = [0.0; BATCH];
                for (batch, out) in out.chunks_mut(BATCH).enumerate() {
                    let singles = &mut singles[..out.len()];
                    self.generator.normals((start + batch * BATCH) as u64, *mean, *std, singles);
                    T::round_all(singles, out);
                }
            }
            Values::Constant(value) => out.fill(T::round(*value)),
            Values::Listed(all) => {
                assert!(start + out.len() <= all.len(), "the range leaves the tensor");
                for (x, &value) in out.iter_mut().zip(&all[start..]) {
                    *x = T::round(value as f32);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Profile;
    use half::{bf16, f16};
    use safetensors::Dtype;

    fn fill(profile: Profile, name: &str, shape: &[usize]) -> Fill {
        let model = RandomModel { seed: 11, profile, tied_embeddings: false };
        let spec = TensorSpec { name: name.into(), shape: shape.to_vec(), dtype: Dtype::F32 };
        Fill::new(&model, &spec).expect("a law")
    }

    /// Bits computed by the rules of the module's page in numpy, far into a tensor too.
    #[test]
    fn bits_are_the_numpy_twins() {
        let cases: [(u64, &str, &[usize], [u32; 5]); 3] = [
            (
                0,
                "model.embed_tokens.weight",
                &[1, 96],
                [0xBFAE_1D5D, 0x3F50_8F87, 0x3D08_7B86, 0xBE2A_A433, 0x3F8B_BA83],
            ),
            (
                42,
                "model.layers.0.input_layernorm.weight",
                &[96],
                [0x3F7D_717F, 0x3F45_B3FE, 0x3FAA_23EC, 0x3F87_459D, 0x3F7F_B77F],
            ),
            (
                u64::MAX,
                "lm_head.weight",
                &[1, 96],
                [0x3D8D_C600, 0x3E8D_A180, 0xBCDA_2800, 0x3DEA_8A00, 0xBDD4_8000],
            ),
        ];
        for (seed, name, shape, expected) in cases {
            let model = RandomModel { seed, profile: Profile::Parity, tied_embeddings: false };
            let spec = TensorSpec { name: name.into(), shape: shape.to_vec(), dtype: Dtype::F32 };
            let fill = Fill::new(&model, &spec).expect("a law");
            let bits = [0, 1, 2, 1000, 123_456_789].map(|i| {
                let mut value = [0.0f32];
                fill.fill(i, &mut value);
                value[0].to_bits()
            });
            assert_eq!(bits, expected, "{name}");
        }
    }

    #[test]
    fn pieces_are_the_whole() {
        for (profile, name) in [
            (Profile::Parity, "a.norm.weight"),
            (Profile::Realistic, "x.mlp.gate.weight"),
            (Profile::Realistic, "x.mlp.up_proj.weight"),
        ] {
            let shape: &[usize] = if name.contains("norm") { &[63] } else { &[7, 9] };
            let fill = fill(profile, name, shape);
            let mut whole = [0.0f32; 63];
            fill.fill(0, &mut whole);
            let mut pieces = [0.0f32; 63];
            for start in [40, 0, 13] {
                let end = [13, 40, 63].into_iter().find(|&end| end > start).expect("an end");
                fill.fill(start, &mut pieces[start..end]);
            }
            assert_eq!(whole.map(f32::to_bits), pieces.map(f32::to_bits), "{name}");
        }
    }

    #[test]
    fn types_differ_by_rounding_only() {
        let fill = fill(Profile::Parity, "model.embed_tokens.weight", &[10, 10]);
        let (mut single, mut brain, mut half) = ([0f32; 100], [bf16::ZERO; 100], [f16::ZERO; 100]);
        fill.fill(0, &mut single);
        fill.fill(0, &mut brain);
        fill.fill(0, &mut half);
        for i in 0..100 {
            assert_eq!(brain[i], bf16::from_f32(single[i]));
            assert_eq!(half[i], f16::from_f32(single[i]));
        }
        assert!(single.iter().any(|x| *x < -0.5) && single.iter().any(|x| *x > 0.5));
    }
}
