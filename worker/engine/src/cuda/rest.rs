//! What of the body comes behind the last attention. In steps with prompts it runs only for rows whose
//! logits are wanted: no other row reads what the others would make.
//!
//! Such steps are captured up to there. The rows are copied together, in memory of their own where places
//! lie as in the body's, and padded to their own bucket. Where more rows are wanted than requests can
//! draw, as for log-probabilities of prompts, all rows run in place. Invariant: whatever is behind the
//! last attention reads rows by themselves, and of what is before it only what is carried over.

use super::Cuda;
use super::Memory;
use super::ahead::most_rows;
use super::launch::{Activations, Launch, Place};
use super::limits::Limits;
use super::run::Step;
use super::sizes::Sizes;
use device::cuda::{Arena, CudaError, DeviceSlice, Stream};
use model::lower::{BufferId, Lowered, Op};
use ops::cuda::{Rows, Tensor};
use ops::embed;
use zerocopy::IntoBytes;

/// Where the rest of a body begins, and what it reads of before.
pub(super) struct Rest {
    /// First launch.
    pub(super) first: usize,
    carried: Vec<Place>,
}

/// The buffers that ops behind the last attention read of before; `None` where these are not of rows by
/// themselves.
pub(super) fn carried(lowered: &Lowered) -> Option<Vec<BufferId>> {
    let last = lowered.body.iter().rposition(|op| matches!(op, Op::Attention { .. }))?;
    let (mut made, mut carried) = (Vec::new(), Vec::new());
    for op in &lowered.body[last + 1..] {
        let by_rows = matches!(
            op,
            Op::Norm { .. }
                | Op::AddNorm { .. }
                | Op::Add { .. }
                | Op::HeadNorm { .. }
                | Op::Linear { .. }
                | Op::SiluMul { .. }
                | Op::Route { .. }
                | Op::Experts { .. }
        );
        if !by_rows {
            return None;
        }
        let uses = op.uses();
        for read in uses.reads {
            if !made.contains(&read) && !carried.contains(&read) {
                carried.push(read);
            }
        }
        made.extend(uses.writes);
    }
    made.contains(&lowered.hidden).then_some(carried)
}

/// The rest of a body that was resolved to `launches`.
pub(super) fn find(
    lowered: &Lowered,
    launches: &[Launch],
    place: impl Fn(BufferId) -> Place,
) -> Option<Rest> {
    let attends = |launch: &Launch| {
        let one = matches!(launch, Launch::Gqa { .. } | Launch::Mla { .. });
        one || matches!(launch, Launch::Block { .. } | Launch::Grouped { .. })
    };
    let first = launches.iter().rposition(attends)? + 1;
    let carried = carried(lowered)?.into_iter().map(place).collect();
    Some(Rest { first, carried })
}

/// Bytes that the rows take, by part.
pub(super) fn bytes(sizes: &Sizes, limits: &Limits) -> [usize; 2] {
    let most = most_rows(limits);
    [sizes.body_bytes(&Limits { rows: most, ..*limits }), most * 4]
}

/// The rows whose logits are wanted.
pub(super) struct Chosen {
    activations: Activations,
    /// u32: 0, 1, 2, and so on.
    order: DeviceSlice,
    /// At most.
    most: usize,
    /// How many they are padded to in the step at hand; `None` where all rows ran in place.
    rows: Option<usize>,
}

impl Chosen {
    pub(super) fn take(
        arena: &mut Arena,
        stream: &Stream,
        (sizes, limits): (&Sizes, &Limits),
        activations: &Activations,
    ) -> Result<Self, CudaError> {
        let (most, [body, order]) = (most_rows(limits), bytes(sizes, limits));
        let body = arena.take("activations of wanted rows", body)?;
        let order = arena.take("order of wanted rows", order)?;
        let all: Vec<u32> = (0..).take(most).collect();
        stream.upload(all.as_bytes(), &order)?;
        stream.synchronize()?;
        Ok(Self { activations: activations.over(body), order, most, rows: None })
    }

    /// All rows run in place.
    pub(super) const fn none(&mut self) {
        self.rows = None;
    }

    /// Wanted rows from `first` on: the hidden states to look them up in, how many of these there are, and
    /// where they lie there.
    pub(super) fn hidden(
        &self,
        place: Place,
        first: usize,
    ) -> Option<(DeviceSlice, usize, DeviceSlice)> {
        let rows = self.rows?;
        let at = self.order.slice(first * 4..rows * 4);
        Some((self.activations.at(place, rows), rows, at))
    }
}

impl Cuda {
    /// Launches of the body that steps with or without prompts are captured with.
    pub(super) fn captured_body(&self, prompts: bool) -> &[Launch] {
        match self.rest.as_ref().filter(|_| prompts) {
            Some(rest) => &self.body[..rest.first],
            None => &self.body,
        }
    }

    /// Enqueues the rest of a step with prompts, of which `wanted` rows are.
    pub(super) fn enqueue_rest(&self, memory: &mut Memory, wanted: usize) -> Result<(), CudaError> {
        let Memory { bucket, .. } = *memory;
        let Some(rest) = &self.rest else { return Ok(()) };
        let fits = wanted <= memory.chosen.most;
        memory.chosen.rows = fits.then(|| memory.limits.bucket(wanted));
        let (memory, launches) = (&*memory, &self.body[rest.first..]);
        if wanted == 0 {
            return Ok(());
        }
        let views = memory.inputs.views(bucket)?;
        let Some(padded) = memory.chosen.rows else {
            let rows = Rows { padded: bucket, count: Some(&views.count) };
            return self.step(memory, rows, &memory.inputs.ids, true)?.run_all(launches);
        };
        let rows = Rows { padded, count: Some(&views.wanted_count) };
        let ids = views.wanted.slice(0..padded * 4);
        let activations = &memory.chosen.activations;
        for place in &rest.carried {
            let from = memory.activations.at(*place, bucket);
            // Choosing rows is looking them up.
            let choose = embed::cuda::Embed {
                ids: &ids,
                table: Tensor::new(&from, self.sizes.dtype),
                table_rows: bucket,
                first_row: 0,
                width: place.width,
                out: &activations.at(*place, padded),
            };
            embed::cuda::embed(self.queue(), rows, &choose)?;
        }
        let step = self.step(memory, rows, &ids, false)?;
        Step { activations, ..step }.run_all(launches)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::lower::lower;
    use model::mesh::{Mesh, Rank};

    fn lowered(family: &str) -> Lowered {
        let config = format!(
            r#"{{"model_type": "{family}", "vocab_size": 64, "hidden_size": 32,
            "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 6,
            "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6, "kv_lora_rank": 16, "q_lora_rank": 12, "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 8, "num_experts": 8,
            "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16,
            "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}}"#
        );
        let config = model::config::parse(&config).expect("a config").config;
        let program = model::families::program(&config, false);
        lower(&program, Mesh::SINGLE, Rank(0), 64).expect("one rank")
    }

    #[test]
    fn results_of_attention_and_the_residual_are_carried_over() {
        for family in ["llama", "qwen3", "qwen3_moe", "deepseek_v3"] {
            let lowered = lowered(family);
            let attended = lowered.body.iter().rev().find_map(|op| match op {
                Op::Attention { out, .. } => Some(*out),
                _ => None,
            });
            let residual = lowered.body.iter().rev().find_map(|op| match op {
                Op::AddNorm { residual, .. } => Some(*residual),
                _ => None,
            });
            let expected = [attended.expect("attention"), residual.expect("a residual")];
            assert_eq!(carried(&lowered), Some(expected.to_vec()), "{family}");
        }
    }

    #[test]
    fn what_mixes_rows_keeps_all_of_them() {
        let mut lowered = lowered("llama");
        let at = lowered.body.len() - 1;
        let write = lowered.body.iter().find(|op| matches!(op, Op::WriteKv { .. }));
        lowered.body.insert(at, write.expect("a write").clone());
        assert_eq!(carried(&lowered), None);
    }
}
