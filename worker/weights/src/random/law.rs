//! How the values of a tensor are distributed, decided by its name and shape.
//!
//! It makes no values. Invariant: a tensor that no rule covers is refused, not guessed.

use super::{RandomError, RandomModel, TensorSpec};

/// What random weights are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Profile {
    /// Scales at which log-probabilities spread over the vocabulary and every term of the model
    /// shows in them, so that a fault in any of them exceeds a tight tolerance:
    ///
    /// | tensor | mean | standard deviation |
    /// |---|---|---|
    /// | vector `*.weight` (norms) | 1 | 0.2 |
    /// | `*.e_score_correction_bias`, `*.bias` | 0 | 0.1 |
    /// | `*embed_tokens.weight` | 0 | 1; 2/sqrt(hidden) where tied |
    /// | `lm_head.weight`, `*.mlp.gate.weight` | 0 | 2/sqrt(fan_in) |
    /// | any other matrix | 0 | 1/sqrt(fan_in) |
    Parity,
    /// Scales of a trained model's size and an even load, to measure engines with: normal of
    /// 1/sqrt(fan_in), norms 1, biases 0, embeddings of unit variance (1/sqrt(hidden) where they
    /// are the head too, so that logits keep unit variance), routers of orthonormal rows.
    #[default]
    Realistic,
}

/// The distribution of a tensor's values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Law {
    /// Independent normal draws.
    Normal {
        /// Their mean.
        mean: f64,
        /// Their standard deviation.
        std: f64,
    },
    /// One value throughout.
    Constant(f64),
    /// The rows of a router `[experts, hidden]`: normal draws, made orthonormal.
    Router {
        /// Rows.
        experts: usize,
        /// Columns.
        hidden: usize,
    },
}

impl RandomModel {
    /// The distribution of a tensor.
    ///
    /// # Errors
    /// [`RandomError::NoLaw`].
    pub fn law(&self, spec: &TensorSpec) -> Result<Law, RandomError> {
        let kind = Kind::of(spec)?;
        let normal = |std| Law::Normal { mean: 0.0, std };
        let per_root = |gain: f64, fan_in: usize| normal(gain / (fan_in as f64).sqrt());
        Ok(match (self.profile, kind) {
            (Profile::Parity, Kind::Norm) => Law::Normal { mean: 1.0, std: 0.2 },
            (Profile::Parity, Kind::Bias) => normal(0.1),
            (Profile::Parity, Kind::Embedding { hidden }) if self.tied_embeddings => {
                per_root(2.0, hidden)
            }
            (Profile::Parity, Kind::Head { fan_in } | Kind::Router { hidden: fan_in, .. }) => {
                per_root(2.0, fan_in)
            }
            (Profile::Realistic, Kind::Norm) => Law::Constant(1.0),
            (Profile::Realistic, Kind::Bias) => Law::Constant(0.0),
            (Profile::Realistic, Kind::Embedding { hidden }) if self.tied_embeddings => {
                per_root(1.0, hidden)
            }
            (Profile::Realistic, Kind::Router { experts, hidden }) => {
                Law::Router { experts, hidden }
            }
            (_, Kind::Embedding { .. }) => normal(1.0),
            (_, Kind::Head { fan_in } | Kind::Matrix { fan_in }) => per_root(1.0, fan_in),
        })
    }

    /// Whether elements depend on each other, so that the tensor has to be made in one go.
    pub(crate) fn made_whole(&self, spec: &TensorSpec) -> bool {
        matches!(self.law(spec), Ok(Law::Router { .. }))
    }
}

/// What a tensor is, by the names that published checkpoints use.
enum Kind {
    Norm,
    Bias,
    Embedding { hidden: usize },
    Head { fan_in: usize },
    Router { experts: usize, hidden: usize },
    Matrix { fan_in: usize },
}

impl Kind {
    fn of(spec: &TensorSpec) -> Result<Self, RandomError> {
        let name = spec.name.as_str();
        // A name ends in a path: `mlp.gate.weight` must not match `xmlp.gate.weight`.
        let ends = |path: &str| {
            name.strip_suffix(path).is_some_and(|head| head.is_empty() || head.ends_with('.'))
        };
        match *spec.shape.as_slice() {
            [_] if ends("bias") || ends("e_score_correction_bias") => Ok(Self::Bias),
            [_] if ends("weight") => Ok(Self::Norm),
            [_, hidden] if ends("embed_tokens.weight") => Ok(Self::Embedding { hidden }),
            [_, fan_in] if ends("lm_head.weight") => Ok(Self::Head { fan_in }),
            [experts, hidden] if ends("mlp.gate.weight") => Ok(Self::Router { experts, hidden }),
            [_, fan_in] if ends("weight") => Ok(Self::Matrix { fan_in }),
            _ => Err(RandomError::NoLaw { tensor: spec.name.clone(), shape: spec.shape.clone() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::Dtype;

    fn law(profile: Profile, tied: bool, name: &str, shape: &[usize]) -> Result<Law, RandomError> {
        let spec = TensorSpec { name: name.into(), shape: shape.to_vec(), dtype: Dtype::F32 };
        RandomModel { seed: 0, profile, tied_embeddings: tied }.law(&spec)
    }

    #[test]
    fn every_rule_of_both_profiles() {
        let normal = |mean, std| Ok(Law::Normal { mean, std });
        let p = |tied, name: &str, shape: &[usize]| law(Profile::Parity, tied, name, shape);
        let r = |tied, name: &str, shape: &[usize]| law(Profile::Realistic, tied, name, shape);
        for norm in ["model.norm.weight", "model.layers.3.self_attn.q_norm.weight"] {
            assert_eq!(p(false, norm, &[64]), normal(1.0, 0.2));
            assert_eq!(r(false, norm, &[64]), Ok(Law::Constant(1.0)));
        }
        for bias in ["a.self_attn.q_proj.bias", "a.mlp.gate.e_score_correction_bias"] {
            assert_eq!(p(false, bias, &[64]), normal(0.0, 0.1));
            assert_eq!(r(false, bias, &[64]), Ok(Law::Constant(0.0)));
        }
        let embed = "model.embed_tokens.weight";
        assert_eq!(p(false, embed, &[100, 64]), normal(0.0, 1.0));
        assert_eq!(p(true, embed, &[100, 64]), normal(0.0, 0.25));
        assert_eq!(r(false, embed, &[100, 64]), normal(0.0, 1.0));
        assert_eq!(r(true, embed, &[100, 64]), normal(0.0, 0.125));
        assert_eq!(p(false, "lm_head.weight", &[100, 64]), normal(0.0, 0.25));
        assert_eq!(r(false, "lm_head.weight", &[100, 64]), normal(0.0, 0.125));
        let router = "model.layers.1.mlp.gate.weight";
        assert_eq!(p(false, router, &[8, 64]), normal(0.0, 0.25));
        assert_eq!(r(false, router, &[8, 64]), Ok(Law::Router { experts: 8, hidden: 64 }));
        // A gate projection is no router.
        for matrix in ["a.mlp.gate_proj.weight", "a.mlp.experts.7.down_proj.weight"] {
            assert_eq!(p(false, matrix, &[8, 64]), normal(0.0, 0.125));
            assert_eq!(r(false, matrix, &[8, 64]), normal(0.0, 0.125));
        }
        for (name, shape) in [("a.weight", &[2, 3, 4][..]), ("a.scale", &[2, 3]), ("a.weight", &[])]
        {
            assert!(matches!(p(false, name, shape), Err(RandomError::NoLaw { .. })));
        }
    }
}
