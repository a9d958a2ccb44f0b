//! A layer of experts with what surrounds it: the router and the routed experts on the step's stream,
//! shared experts beside them on another or in their launch, and one launch for all sums and the norm
//! behind.
//!
//! It finds such layers in a program and launches nothing. Invariant: what is found means the same as
//! its ops one by one, to the bit; what runs beside neither reads nor writes what the others write.

use super::launch::{Experts, Launch, Place};
use device::cuda::DeviceSlice;
use model::lower::{BufferId, Lowered, Op};
use ops::moe::Router;
use ops::moe::cuda::stream::Always;

/// Ops of a layer, in a program's order.
#[derive(Clone, Copy)]
pub(super) struct Found<'a> {
    /// Scores, choices.
    pub(super) routing: [&'a Op; 2],
    pub(super) experts: &'a Op,
    /// Projection, activation, projection of shared experts, and where their result is; or nothing.
    pub(super) shared: Option<(&'a [Op], BufferId)>,
    /// The norm of the residual with everything added.
    pub(super) norm: &'a Op,
    /// How many ops these are, with those that [`Layer`] does without.
    pub(super) length: usize,
}

/// The layer that `ops` begin with.
pub(super) fn find<'a>(lowered: &Lowered, ops: &'a [Op]) -> Option<Found<'a>> {
    let [score, route, experts, after @ ..] = ops else { return None };
    let (
        Op::Linear { x: scored, out: logits, .. },
        Op::Route { logits: routed, .. },
        Op::Experts { x, out: sum, .. },
    ) = (score, route, experts)
    else {
        return None;
    };
    if scored != x || logits != routed {
        return None;
    }
    let shared = shared(lowered, after, *x, *sum);
    let (total, behind) = match shared {
        Some(Shared { total, behind, .. }) => (total, behind),
        None => (*sum, after),
    };
    let norm = behind.first()?;
    matches!(norm, Op::AddNorm { delta, .. } if *delta == total).then_some(Found {
        routing: [score, route],
        experts,
        shared: shared.map(|shared| (shared.ops, shared.result)),
        norm,
        length: ops.len() - behind.len() + 1,
    })
}

/// Shared experts.
#[derive(Clone, Copy)]
struct Shared<'a> {
    ops: &'a [Op],
    result: BufferId,
    /// Of both, in the place of either.
    total: BufferId,
    /// The ops after the sum.
    behind: &'a [Op],
}

/// Shared experts of `x`, whose result is added to `sum`, where no buffer of theirs lies in the place
/// of either.
fn shared<'a>(lowered: &Lowered, ops: &'a [Op], x: BufferId, sum: BufferId) -> Option<Shared<'a>> {
    let [first, act, second, add, behind @ ..] = ops else { return None };
    let (
        Op::Linear { x: read, out: gate_up, .. },
        Op::SiluMul { gate_up: activated, out: inner },
        Op::Linear { x: projected, out: result, .. },
        Op::Add { x: added, target },
    ) = (first, act, second, add)
    else {
        return None;
    };
    let place = |id: BufferId| {
        let buffer = &lowered.buffers[id.0];
        buffer.offset..buffer.offset + buffer.width
    };
    let apart = |a: BufferId, b: BufferId| {
        let (a, b) = (place(a), place(b));
        a.end <= b.start || b.end <= a.start
    };
    let chained = [*read, *activated, *projected] == [x, *gate_up, *inner];
    let both = [*added, *target];
    let summed = both == [*result, sum] || both == [sum, *result];
    let beside = [*gate_up, *inner, *result].iter().all(|own| apart(*own, sum) && apart(*own, x));
    (chained && summed && beside).then_some(Shared {
        ops: &ops[..3],
        result: *result,
        total: *target,
        behind,
    })
}

/// A layer resolved.
pub(super) struct Layer {
    /// Makes `logits`.
    pub(super) score: Launch,
    pub(super) logits: Place,
    pub(super) router: Router<'static>,
    pub(super) correction: Option<DeviceSlice>,
    pub(super) x: Place,
    pub(super) experts: Experts,
    /// Launches of shared experts, and their result.
    pub(super) shared: Option<(Vec<Launch>, Place)>,
    pub(super) residual: Place,
    pub(super) weight: DeviceSlice,
    pub(super) eps: f32,
    pub(super) out: Place,
}

impl Layer {
    /// Shared experts as experts that every token takes: nothing where there are none, `None` where they
    /// are more than two products.
    pub(super) fn always(&self) -> Option<Option<Always<'_>>> {
        let Some((launches, _)) = &self.shared else { return Some(None) };
        let [
            Launch::Linear { w: gate_up, bias: None, .. },
            Launch::SiluMul { out, .. },
            Launch::Linear { w: down, bias: None, .. },
        ] = launches.as_slice()
        else {
            return None;
        };
        Some(Some(Always { gate_up, down, width: out.width }))
    }

    /// What is between the products of shared experts, and their result.
    pub(super) fn shared_places(&self) -> Option<[Place; 2]> {
        let (launches, result) = self.shared.as_ref()?;
        let inner = launches.iter().find_map(|launch| match launch {
            Launch::SiluMul { out, .. } => Some(*out),
            _ => None,
        })?;
        Some([inner, *result])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::lower::lower;
    use model::mesh::{Mesh, Rank};

    fn lowered(shared: usize) -> Lowered {
        let config = format!(
            r#"{{"model_type": "deepseek_v3", "vocab_size": 64, "hidden_size": 32,
            "num_hidden_layers": 4, "num_attention_heads": 5, "intermediate_size": 48,
            "max_position_embeddings": 512, "kv_lora_rank": 16, "q_lora_rank": 12,
            "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
            "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
            "n_shared_experts": {shared}, "moe_intermediate_size": 16, "first_k_dense_replace": 1}}"#
        );
        let config = model::config::parse(&config).expect("a config").config;
        let program = model::families::program(&config, false);
        lower(&program, Mesh::SINGLE, Rank(0), 64).expect("one rank")
    }

    fn found(lowered: &Lowered) -> Vec<Found<'_>> {
        let all = 0..lowered.body.len();
        all.filter_map(|at| find(lowered, &lowered.body[at..])).collect()
    }

    #[test]
    fn every_layer_of_experts_is_found() {
        for (shared, ops) in [(0, 4), (1, 8)] {
            let lowered = lowered(shared);
            let found = found(&lowered);
            assert_eq!(found.len(), 3);
            assert!(found.iter().all(|f| f.length == ops && f.shared.is_some() == (shared > 0)));
        }
    }

    #[test]
    fn what_would_be_overwritten_is_not_run_beside() {
        let mut lowered = lowered(1);
        let layers = found(&lowered);
        let Op::Experts { out: sum, .. } = *layers[0].experts else { panic!("experts") };
        let Op::SiluMul { out: inner, .. } = layers[0].shared.expect("shared experts").0[1] else {
            panic!("an activation")
        };
        lowered.buffers[inner.0].offset = lowered.buffers[sum.0].offset;
        assert_eq!(found(&lowered).len(), 2);
    }
}
