//! Names of the kernels that ops run on this processor, for reports.
//!
//! It asks the functions that launches ask; it selects nothing itself.

use device::Isa;
use model::lower::{LocalAttention, Op};
use ops::{linear, mla};

/// The kernel of `op` in a step of `tokens`, all of one sequence where that matters; empty for ops
/// that move data between ranks.
#[must_use]
pub fn kernel(op: &Op, tokens: usize) -> String {
    kernel_on(Isa::detect(), op, tokens)
}

fn kernel_on(isa: Isa, op: &Op, tokens: usize) -> String {
    match *op {
        Op::Linear { .. } => linear::select(isa, tokens).name().to_owned(),
        // An expert's rows are a part of the step's; with few tokens it is one each.
        Op::Experts { experts, top_k, .. } => {
            let rows = (tokens * top_k).div_ceil(experts.max(1)).max(1);
            linear::select(isa, rows).name().to_owned()
        }
        Op::Attention {
            attention: LocalAttention::Mla { heads, nope, rope, v, latent, .. },
            ..
        } => {
            let shape = mla::Mla { heads, nope, rope, v, latent, scale: 1.0 };
            format!("{}_{}", mla::select(&shape, tokens).name(), isa.name())
        }
        Op::Attention { .. } => format!("tiles_{}", isa.name()),
        Op::Embed { .. } | Op::WriteKv { .. } => "copy".to_owned(),
        Op::AllReduce { .. } | Op::AllGather { .. } | Op::ReduceScatter { .. } => String::new(),
        // One kernel each, for any processor.
        Op::Norm { .. }
        | Op::AddNorm { .. }
        | Op::Add { .. }
        | Op::HeadNorm { .. }
        | Op::Rope { .. }
        | Op::SiluMul { .. }
        | Op::Route { .. } => "portable".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::lower::BufferId;
    use model::program::{CacheSlot, WeightId};

    #[test]
    fn names_follow_the_selections() {
        let buffer = BufferId(0);
        let linear = Op::Linear { x: buffer, parts: vec![], biases: vec![], out: buffer };
        assert_eq!(kernel_on(Isa::Avx512, &linear, 1), "gemv_avx512");
        assert_eq!(kernel_on(Isa::Avx512, &linear, 512), "gemm_avx512");
        assert_eq!(kernel_on(Isa::Avx2, &linear, 512), "rows");
        let norm = Op::Norm { x: buffer, weight: WeightId(0), eps: 1e-6, out: buffer };
        assert_eq!(kernel_on(Isa::Avx512, &norm, 1), "portable");
        let attention = LocalAttention::Mla {
            heads: 16,
            nope: 128,
            rope: 64,
            v: 128,
            latent: 512,
            scale: 0.1,
            kv_b: WeightId(0),
        };
        let slot = CacheSlot { group: 0, row: 0 };
        let mla = Op::Attention { q: buffer, attention, slot, out: buffer };
        assert_eq!(kernel_on(Isa::Scalar, &mla, 1), "absorbed_scalar");
        assert_eq!(kernel_on(Isa::Avx512, &mla, 1000), "expanded_avx512");
    }
}
