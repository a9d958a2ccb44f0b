//! Lowered programs of every mesh, executed on simulated ranks against one rank.
//!
//! An interpreter in f64 runs the op lists of all ranks in step; collectives are sums and copies
//! between their buffers. Ops are the naive ones: this tests placements, shards and collectives,
//! not kernels. Each data-parallel shard has a sequence of its own.

use model::config::{self, RopeConfig};
use model::families;
use model::lower::{BufferId, LocalAttention, LocalSlice, LocalWeight, Lowered, Op, Region, lower};
use model::mesh::{Axis, Mesh, Rank};
use model::program::{Dim, GroupScore, Router, Scoring, WeightId};
use serde_json::{Value, json};
use std::collections::BTreeMap;

type Rows = Vec<Vec<f64>>;

/// Tokens of each shard's sequence.
const TOKENS: usize = 5;
const VOCAB: usize = 24;

fn families_to_run() -> Vec<(&'static str, Value)> {
    let base = |kind: &str, fields: Value| {
        let mut base = json!({"model_type": kind, "vocab_size": VOCAB, "hidden_size": 16,
            "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
            "max_position_embeddings": 64, "num_key_value_heads": 2, "head_dim": 4,
            "attention_bias": true});
        fields.as_object().expect("fields").iter().for_each(|(k, v)| base[k] = v.clone());
        base
    };
    let mla = json!({"num_key_value_heads": 4, "kv_lora_rank": 6, "q_lora_rank": 8,
        "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3, "n_routed_experts": 8,
        "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "n_shared_experts": 1,
        "moe_intermediate_size": 8, "first_k_dense_replace": 1});
    vec![
        ("llama", base("llama", json!({"mlp_bias": true, "tie_word_embeddings": true}))),
        (
            "qwen3",
            base(
                "qwen3",
                json!({"use_sliding_window": true, "sliding_window": 3,
            "max_window_layers": 1}),
            ),
        ),
        (
            "qwen3_moe",
            base(
                "qwen3_moe",
                json!({"num_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": 8, "norm_topk_prob": true}),
            ),
        ),
        ("deepseek_v2", base("deepseek_v2", mla.clone())),
        ("deepseek_v3", base("deepseek_v3", mla)),
    ]
}

#[test]
fn every_mesh_equals_one_rank() {
    let mesh = |dp, tp, expert_parallel| Mesh { dp, tp, expert_parallel };
    let meshes = [
        mesh(1, 2, false),
        mesh(1, 4, false),
        mesh(1, 2, true),
        mesh(1, 4, true),
        mesh(2, 1, false),
        mesh(2, 1, true),
        mesh(2, 2, false),
        mesh(2, 2, true),
        mesh(4, 2, true),
    ];
    for (name, config) in families_to_run() {
        for mesh in meshes {
            let sharded = run(&config, mesh);
            for (rank, logits) in sharded.iter().enumerate() {
                let shard = mesh.coordinate(Rank(rank), Axis::Dp);
                let single = Simulation::new(&config, Mesh::SINGLE, &[sequence(shard)]).run();
                for (a, b) in logits.iter().flatten().zip(single[0].iter().flatten()) {
                    assert!((a - b).abs() < 1e-9, "{name} on {mesh:?}, rank {rank}: {a} and {b}");
                }
            }
        }
    }
}

#[test]
fn a_missing_reduction_is_seen() {
    let (_, config) = families_to_run().remove(0);
    let mesh = Mesh { dp: 1, tp: 2, expert_parallel: false };
    let whole = run(&config, mesh);
    let mut broken = Simulation::new(&config, mesh, &[sequence(0)]);
    for rank in &mut broken.ranks {
        let first = rank.low.body.iter().position(|op| matches!(op, Op::AllReduce { .. }));
        rank.low.body.remove(first.expect("a reduction"));
    }
    assert_ne!(whole, broken.run());
}

fn run(config: &Value, mesh: Mesh) -> Vec<Rows> {
    let sequences: Vec<_> = (0..mesh.dp).map(sequence).collect();
    Simulation::new(config, mesh, &sequences).run()
}

fn sequence(shard: usize) -> Vec<usize> {
    (0..TOKENS).map(|t| (shard * 7 + t * 5 + 3) % VOCAB).collect()
}

/// A number from a name and an index, in -1..1.
fn noise(name: &str, index: usize) -> f64 {
    let bytes = name.bytes().chain(index.to_le_bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    ((hash ^ hash >> 29).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 11) as f64 / (1_u64 << 52) as f64
        - 1.0
}

struct Simulation {
    mesh: Mesh,
    ranks: Vec<RankState>,
}

struct RankState {
    low: Lowered,
    ids: Vec<usize>,
    buffers: Vec<Rows>,
    kv: BTreeMap<(usize, usize), Rows>,
    routing: Vec<Vec<(usize, f64)>>,
}

impl Simulation {
    fn new(config: &Value, mesh: Mesh, sequences: &[Vec<usize>]) -> Self {
        let config = config::parse(&config.to_string()).expect("a config").config;
        let program = families::program(&config, mesh.expert_parallel);
        let rank = |rank: usize| {
            let low = lower(&program, mesh, Rank(rank), TOKENS).expect("a mesh that divides");
            RankState {
                ids: sequences[mesh.coordinate(Rank(rank), Axis::Dp)].clone(),
                buffers: vec![Rows::new(); low.buffers.len()],
                kv: BTreeMap::new(),
                routing: Vec::new(),
                low,
            }
        };
        Self { mesh, ranks: (0..mesh.world()).map(rank).collect() }
    }

    /// Logits of every rank.
    fn run(mut self) -> Vec<Rows> {
        for at in 0..self.ranks[0].low.body.len() {
            self.op(|low| &low.body[at]);
        }
        for rank in &mut self.ranks {
            rank.buffers[rank.low.chosen.0] = rank.buffers[rank.low.hidden.0].clone();
        }
        for at in 0..self.ranks[0].low.head.len() {
            self.op(|low| &low.head[at]);
        }
        self.ranks.iter().map(|rank| rank.buffers[rank.low.logits.0].clone()).collect()
    }

    fn op(&mut self, pick: impl Fn(&Lowered) -> &Op) {
        let first = pick(&self.ranks[0].low).clone();
        for rank in &self.ranks {
            assert_eq!(pick(&rank.low).name(), first.name(), "ranks run the same program");
        }
        match first {
            Op::AllReduce { x, axis } => self.collective(x, x, axis, |all, _| sum(all)),
            Op::ReduceScatter { x, axis, out } => self.collective(x, out, axis, |all, at| {
                let rows = all[0].len() / all.len();
                sum(all)[at * rows..(at + 1) * rows].to_vec()
            }),
            Op::AllGather { x, dim: Dim::Tokens, axis, out } => {
                self.collective(x, out, axis, |all, _| all.concat());
            }
            Op::AllGather { x, dim: Dim::Width, axis, out } => {
                self.collective(x, out, axis, |all, _| {
                    (0..all[0].len())
                        .map(|t| all.iter().flat_map(|x| x[t].clone()).collect())
                        .collect()
                });
            }
            _ => {
                for rank in &mut self.ranks {
                    let op = pick(&rank.low).clone();
                    rank.op(&op);
                }
            }
        }
    }

    fn collective(
        &mut self,
        x: BufferId,
        out: BufferId,
        axis: Axis,
        f: impl Fn(&[Rows], usize) -> Rows,
    ) {
        let results: Vec<Rows> = (0..self.ranks.len())
            .map(|rank| {
                let peers = self.mesh.peers(Rank(rank), axis);
                let all: Vec<Rows> =
                    peers.iter().map(|peer| self.ranks[peer.0].buffers[x.0].clone()).collect();
                f(&all, self.mesh.coordinate(Rank(rank), axis))
            })
            .collect();
        for (rank, result) in self.ranks.iter_mut().zip(results) {
            rank.set(out, result);
        }
    }
}

fn sum(all: &[Rows]) -> Rows {
    let mut total = all[0].clone();
    for other in &all[1..] {
        add(&mut total, other);
    }
    total
}

fn add(x: &mut Rows, y: &Rows) {
    assert_eq!(x.len(), y.len());
    x.iter_mut().zip(y).for_each(|(x, y)| x.iter_mut().zip(y).for_each(|(x, y)| *x += y));
}

fn normed(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    x.iter().zip(weight).map(|(x, w)| x / (mean + eps).sqrt() * w).collect()
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let e: Vec<f64> = x.iter().map(|x| x.exp()).collect();
    let sum: f64 = e.iter().sum();
    e.into_iter().map(|e| e / sum).collect()
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

impl RankState {
    fn get(&self, id: BufferId) -> Rows {
        self.buffers[id.0].clone()
    }

    /// Every value has the shape that the lowering planned for it.
    fn set(&mut self, id: BufferId, rows: Rows) {
        let buffer = &self.low.buffers[id.0];
        let elements: usize = rows.iter().map(Vec::len).sum();
        assert_eq!(elements, buffer.per_token() * TOKENS, "{buffer:?}");
        assert!(rows.iter().all(|row| row.len() == buffer.width), "{buffer:?}");
        self.buffers[id.0] = rows;
    }

    fn weight(&self, id: WeightId) -> &LocalWeight {
        self.low.weights[id.0].as_ref().expect("a weight held here")
    }

    fn matrix(&self, id: WeightId) -> Rows {
        let weight = self.weight(id);
        let Region::Matrix { rows, cols, of } = &weight.region else { panic!("{}", weight.name) };
        let scale = 1.5 / (of.1 as f64).sqrt();
        let row = |r| cols.clone().map(|c| noise(&weight.name, r * of.1 + c) * scale).collect();
        rows.clone().map(row).collect()
    }

    fn vector(&self, id: WeightId) -> Vec<f64> {
        let weight = self.weight(id);
        let Region::Vector { range, .. } = &weight.region else { panic!("{}", weight.name) };
        let mean = if weight.name.ends_with("norm.weight") { 1.0 } else { 0.0 };
        range.clone().map(|i| mean + 0.3 * noise(&weight.name, i)).collect()
    }

    fn linear(&self, x: &Rows, parts: &[WeightId], biases: &[WeightId]) -> Rows {
        let w: Rows = parts.iter().flat_map(|&part| self.matrix(part)).collect();
        let bias: Vec<f64> = biases.iter().flat_map(|&bias| self.vector(bias)).collect();
        let bias = |o: usize| bias.get(o).copied().unwrap_or(0.0);
        x.iter().map(|x| w.iter().enumerate().map(|(o, w)| dot(w, x) + bias(o)).collect()).collect()
    }

    fn op(&mut self, op: &Op) {
        match *op {
            Op::Embed { table, first_row, out } => {
                let table = self.matrix(table);
                let width = self.low.buffers[out.0].width;
                let row = |&id: &usize| {
                    let row = id.checked_sub(first_row).and_then(|row| table.get(row));
                    row.cloned().unwrap_or_else(|| vec![0.0; width])
                };
                let rows = self.ids.iter().map(row).collect();
                self.set(out, rows);
            }
            Op::Norm { x, weight, eps, out } => {
                let weight = self.vector(weight);
                let rows = self.get(x).iter().map(|x| normed(x, &weight, eps)).collect();
                self.set(out, rows);
            }
            Op::AddNorm { delta, residual, weight, eps, out } => {
                self.op(&Op::Add { x: delta, target: residual });
                self.op(&Op::Norm { x: residual, weight, eps, out });
            }
            Op::Add { x, target } => {
                let x = self.get(x);
                add(&mut self.buffers[target.0], &x);
            }
            Op::HeadNorm { x, weight, eps, slice } => {
                let weight = self.vector(weight);
                self.heads(x, slice, |head, _| {
                    let y = normed(head, &weight, eps);
                    head.copy_from_slice(&y);
                });
            }
            Op::Rope { x, rope, slice } => {
                let rope = self.low.ropes[rope.0].clone();
                self.heads(x, slice, |head, position| rotate(head, position, &rope));
            }
            Op::Linear { x, ref parts, ref biases, out } => {
                let rows = self.linear(&self.get(x), parts, biases);
                self.set(out, rows);
            }
            Op::WriteKv { rows, slot } => {
                let width = self.low.groups[slot.group].layers[slot.row].width;
                assert_eq!(self.low.buffers[rows.0].width, width, "rows are cache rows");
                self.kv.insert((slot.group, slot.row), self.get(rows));
            }
            Op::Attention { q, ref attention, slot, out } => {
                let kv = self.kv[&(slot.group, slot.row)].clone();
                let rows = self.attention(&self.get(q), attention, &kv);
                self.set(out, rows);
            }
            Op::SiluMul { gate_up, out } => {
                let n = self.low.buffers[out.0].width;
                let row = |x: &Vec<f64>| (0..n).map(|i| silu(x[i]) * x[n + i]).collect();
                let rows = self.get(gate_up).iter().map(row).collect();
                self.set(out, rows);
            }
            Op::Route { logits, ref router } => {
                let bias = router.correction.map(|id| self.vector(id));
                self.routing =
                    self.get(logits).iter().map(|x| choose(x, router, bias.as_deref())).collect();
            }
            Op::Experts { x, first, ref gate, ref up, ref down, out, .. } => {
                let x = self.get(x);
                let rows = x.iter().zip(&self.routing).map(|(x, chosen)| {
                    let mut sum = vec![0.0; x.len()];
                    for (expert, weight) in chosen {
                        let Some(e) = expert.checked_sub(first).filter(|e| *e < gate.len()) else {
                            continue;
                        };
                        let x = vec![x.clone()];
                        let mut inner = self.linear(&x, &[gate[e]], &[]);
                        let up = self.linear(&x, &[up[e]], &[]);
                        inner[0].iter_mut().zip(&up[0]).for_each(|(g, u)| *g = silu(*g) * u);
                        let y = self.linear(&inner, &[down[e]], &[]);
                        sum.iter_mut().zip(&y[0]).for_each(|(s, y)| *s += weight * y);
                    }
                    sum
                });
                let rows = rows.collect();
                self.set(out, rows);
            }
            Op::AllReduce { .. } | Op::AllGather { .. } | Op::ReduceScatter { .. } => {
                unreachable!("collectives see all ranks")
            }
        }
    }

    fn heads(&mut self, x: BufferId, slice: LocalSlice, mut f: impl FnMut(&mut [f64], usize)) {
        for (position, row) in self.buffers[x.0].iter_mut().enumerate() {
            for h in 0..slice.count {
                let start = slice.offset + h * slice.stride;
                f(&mut row[start..start + slice.width], position);
            }
        }
    }

    fn attention(&self, q: &Rows, attention: &LocalAttention, kv: &Rows) -> Rows {
        let mut out = Rows::new();
        for (t, q) in q.iter().enumerate() {
            let mut row = Vec::new();
            match *attention {
                LocalAttention::Gqa { heads, kv_heads, head_dim: d, scale, window } => {
                    let from = window.map_or(0, |window| (t + 1).saturating_sub(window));
                    for head in 0..heads {
                        let at = head / (heads / kv_heads) * d;
                        let q = &q[head * d..][..d];
                        let scores: Vec<f64> =
                            (from..=t).map(|s| dot(q, &kv[s][at..at + d]) * scale).collect();
                        row.extend(mix(&softmax(&scores), |s| {
                            &kv[from + s][kv_heads * d + at..][..d]
                        }));
                    }
                }
                LocalAttention::Mla { heads, nope, rope, v, latent, scale, kv_b } => {
                    let expanded: Rows = {
                        let w = self.matrix(kv_b);
                        kv.iter()
                            .map(|kv| w.iter().map(|w| dot(w, &kv[..latent])).collect())
                            .collect()
                    };
                    for head in 0..heads {
                        let q = &q[head * (nope + rope)..][..nope + rope];
                        let at = head * (nope + v);
                        let score = |s: usize| {
                            dot(&q[..nope], &expanded[s][at..at + nope])
                                + dot(&q[nope..], &kv[s][latent..])
                        };
                        let scores: Vec<f64> = (0..=t).map(|s| score(s) * scale).collect();
                        row.extend(mix(&softmax(&scores), |s| &expanded[s][at + nope..][..v]));
                    }
                }
            }
            out.push(row);
        }
        out
    }
}

/// The weighted sum of values.
fn mix<'a>(weights: &[f64], value: impl Fn(usize) -> &'a [f64]) -> Vec<f64> {
    let width = value(0).len();
    (0..width).map(|i| weights.iter().enumerate().map(|(s, w)| w * value(s)[i]).sum()).collect()
}

fn rotate(x: &mut [f64], position: usize, rope: &RopeConfig) {
    let (half, original) = (x.len() / 2, x.to_vec());
    for (i, frequency) in rope.inv_freq().into_iter().enumerate() {
        let (sin, cos) = (position as f64 * f64::from(frequency)).sin_cos();
        let (a, b) = if rope.interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
        x[a] = original[a] * cos - original[b] * sin;
        x[b] = original[b] * cos + original[a] * sin;
    }
}

fn choose(logits: &[f64], router: &Router, bias: Option<&[f64]>) -> Vec<(usize, f64)> {
    let scores = match router.scoring {
        Scoring::Softmax => softmax(logits),
        Scoring::Sigmoid => logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
    };
    let mut order: Vec<f64> =
        scores.iter().enumerate().map(|(e, s)| s + bias.map_or(0.0, |bias| bias[e])).collect();
    if let Some(limit) = router.limit {
        let size = router.experts / limit.groups;
        let best = if limit.score == GroupScore::Max { 1 } else { 2 };
        let group = |g: &[f64]| top(g, best).into_iter().map(|i| g[i]).sum::<f64>();
        let groups: Vec<f64> = order.chunks(size).map(group).collect();
        let kept = top(&groups, limit.chosen);
        for (e, score) in order.iter_mut().enumerate() {
            if !kept.contains(&(e / size)) {
                *score = f64::NEG_INFINITY;
            }
        }
    }
    let chosen = top(&order, router.top_k);
    let sum: f64 = if router.norm_topk { chosen.iter().map(|&e| scores[e]).sum() } else { 1.0 };
    chosen.into_iter().map(|e| (e, scores[e] / sum * router.scale)).collect()
}

fn top(x: &[f64], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..x.len()).collect();
    order.sort_by(|&a, &b| x[b].total_cmp(&x[a]));
    order.truncate(k);
    order
}
