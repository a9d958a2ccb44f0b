//! A whole model in f64 the obvious way: no cache, no batch, no fusion, every token recomputed.
//!
//! Written from the published definitions of the families and from nothing of the program or ops,
//! so that agreement means something.

use model::config::{
    DeepSeek, DeepSeekVersion, Gqa, Mla, ModelConfig, Qwen3Moe, RopeConfig, RopeScaling,
};
use std::cell::RefCell;
use std::f64::consts::PI;
use weights::Weights;

pub type Rows = Vec<Vec<f64>>;
/// From router logits to experts and their weights.
type Choice<'a> = dyn Fn(&[f64]) -> Vec<(usize, f64)> + 'a;

/// Log-probabilities after each token, `[tokens][vocab]`.
pub fn logprobs(config: &ModelConfig, weights: &Weights, tokens: &[u32]) -> Rows {
    Naive::new(config, weights).logprobs(tokens)
}

/// Of each token whether it would take other experts in some layer, were one of a router's scores off by
/// `part` of their spread.
pub fn undecided(config: &ModelConfig, weights: &Weights, tokens: &[u32], part: f64) -> Vec<bool> {
    let mut naive = Naive::new(config, weights);
    naive.undecided = Some((part, RefCell::new(vec![false; tokens.len()])));
    naive.logprobs(tokens);
    naive.undecided.map(|(_, tokens)| tokens.into_inner()).unwrap_or_default()
}

pub struct Naive<'a> {
    pub config: &'a ModelConfig,
    pub weights: &'a Weights,
    /// Which tokens are, and how far a score may be off.
    undecided: Option<(f64, RefCell<Vec<bool>>)>,
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

pub fn softmax(x: &[f64]) -> Vec<f64> {
    let top = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = x.iter().map(|x| (x - top).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.into_iter().map(|e| e / sum).collect()
}

pub fn add(x: &mut Rows, y: &Rows) {
    for (x, y) in x.iter_mut().zip(y) {
        x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    }
}

pub fn rms(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    x.iter().zip(weight).map(|(x, w)| x / (mean + eps).sqrt() * w).collect()
}

/// Indices of the `k` largest, first of equals first.
fn top(x: &[f64], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..x.len()).collect();
    order.sort_by(|&a, &b| x[b].total_cmp(&x[a]));
    order.truncate(k);
    order
}

impl<'a> Naive<'a> {
    pub const fn new(config: &'a ModelConfig, weights: &'a Weights) -> Self {
        Self { config, weights, undecided: None }
    }

    pub fn get(&self, name: &str) -> Vec<f64> {
        let weight = self.weights.get(name).unwrap_or_else(|| panic!("no weight {name}"));
        weight.data.to_f32().into_iter().map(f64::from).collect()
    }

    pub fn linear(&self, x: &Rows, name: &str) -> Rows {
        let w = self.get(&format!("{name}.weight"));
        let bias =
            self.weights.get(&format!("{name}.bias")).map(|_| self.get(&format!("{name}.bias")));
        let cols = x[0].len();
        let row = |x: &Vec<f64>| {
            let dots = w.chunks_exact(cols).enumerate().map(|(o, w)| {
                let b = bias.as_ref().map_or(0.0, |bias| bias[o]);
                w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>() + b
            });
            dots.collect()
        };
        x.iter().map(row).collect()
    }

    pub fn norm(&self, x: &Rows, name: &str, eps: f64) -> Rows {
        let weight = self.get(&format!("{name}.weight"));
        x.iter().map(|x| rms(x, &weight, eps)).collect()
    }

    fn logprobs(&self, tokens: &[u32]) -> Rows {
        let decoder = self.config.decoder();
        let table = self.get("model.embed_tokens.weight");
        let embed = |&t: &u32| table[t as usize * decoder.hidden..][..decoder.hidden].to_vec();
        let mut x: Rows = tokens.iter().map(embed).collect();
        for layer in 0..decoder.layers {
            let name = format!("model.layers.{layer}");
            let h = self.norm(&x, &format!("{name}.input_layernorm"), decoder.norm_eps);
            add(&mut x, &self.attention(&h, layer, &format!("{name}.self_attn")));
            let h = self.norm(&x, &format!("{name}.post_attention_layernorm"), decoder.norm_eps);
            add(&mut x, &self.feed_forward(&h, layer, &format!("{name}.mlp")));
        }
        let h = self.norm(&x, "model.norm", decoder.norm_eps);
        let head = if decoder.tied { "model.embed_tokens" } else { "lm_head" };
        let logits = self.linear(&h, head);
        logits.iter().map(|row| softmax(row).into_iter().map(f64::ln).collect()).collect()
    }

    fn attention(&self, h: &Rows, layer: usize, name: &str) -> Rows {
        match self.config {
            ModelConfig::Llama(c) => self.gqa(h, &c.attention, name, None, None),
            ModelConfig::Qwen3(c) => {
                self.gqa(h, &c.attention, name, c.windows[layer], Some(c.decoder.norm_eps))
            }
            ModelConfig::Qwen3Moe(c) => {
                self.gqa(h, &c.attention, name, None, Some(c.decoder.norm_eps))
            }
            ModelConfig::DeepSeek(c) => self.mla(h, &c.attention, name),
        }
    }

    fn gqa(&self, h: &Rows, c: &Gqa, name: &str, window: Option<usize>, qk: Option<f64>) -> Rows {
        let d = c.head_dim;
        let mut q = self.linear(h, &format!("{name}.q_proj"));
        let mut k = self.linear(h, &format!("{name}.k_proj"));
        let v = self.linear(h, &format!("{name}.v_proj"));
        for (x, norm) in [(&mut q, "q_norm"), (&mut k, "k_norm")] {
            for (t, row) in x.iter_mut().enumerate() {
                for head in row.chunks_exact_mut(d) {
                    if let Some(eps) = qk {
                        let weight = self.get(&format!("{name}.{norm}.weight"));
                        let normed = rms(head, &weight, eps);
                        head.copy_from_slice(&normed);
                    }
                    rotate(head, t, &c.rope);
                }
            }
        }
        let scale = 1.0 / (d as f64).sqrt();
        let group = c.heads / c.kv_heads;
        let mut out = vec![vec![0.0; c.heads * d]; h.len()];
        for (t, out) in out.iter_mut().enumerate() {
            let from = window.map_or(0, |window| (t + 1).saturating_sub(window));
            for head in 0..c.heads {
                let kv = head / group * d;
                let q = &q[t][head * d..][..d];
                let dot =
                    |s: usize| q.iter().zip(&k[s][kv..][..d]).map(|(q, k)| q * k).sum::<f64>();
                let p = softmax(&(from..=t).map(|s| dot(s) * scale).collect::<Vec<_>>());
                for (s, p) in (from..=t).zip(p) {
                    for i in 0..d {
                        out[head * d + i] += p * v[s][kv + i];
                    }
                }
            }
        }
        self.linear(&out, &format!("{name}.o_proj"))
    }

    fn mla(&self, h: &Rows, c: &Mla, name: &str) -> Rows {
        let q = match c.q_lora {
            None => self.linear(h, &format!("{name}.q_proj")),
            Some(_) => {
                let a = self.linear(h, &format!("{name}.q_a_proj"));
                let a = self.norm(&a, &format!("{name}.q_a_layernorm"), 1e-6);
                self.linear(&a, &format!("{name}.q_b_proj"))
            }
        };
        let kv_a = self.linear(h, &format!("{name}.kv_a_proj_with_mqa"));
        let latent: Rows = kv_a.iter().map(|row| row[..c.latent].to_vec()).collect();
        let latent = self.norm(&latent, &format!("{name}.kv_a_layernorm"), 1e-6);
        let kv = self.linear(&latent, &format!("{name}.kv_b_proj"));
        let mut scale = 1.0 / ((c.nope + c.rope_dim) as f64).sqrt();
        if let RopeScaling::Yarn(yarn) = &c.rope.scaling
            && let Some(all) = yarn.mscale_all_dim.filter(|all| *all != 0.0)
        {
            scale *= (0.1 * all * yarn.factor.ln() + 1.0).powi(2);
        }
        let rotated_k: Rows = (0..h.len())
            .map(|t| {
                let mut k = kv_a[t][c.latent..].to_vec();
                rotate(&mut k, t, &c.rope);
                k
            })
            .collect();
        let (qk, kv_each) = (c.nope + c.rope_dim, c.nope + c.v);
        let mut out = vec![vec![0.0; c.heads * c.v]; h.len()];
        for (t, out) in out.iter_mut().enumerate() {
            for head in 0..c.heads {
                let mut q = q[t][head * qk..][..qk].to_vec();
                rotate(&mut q[c.nope..], t, &c.rope);
                let scores: Vec<f64> = (0..=t)
                    .map(|s| {
                        let k = kv[s][head * kv_each..][..c.nope].iter().chain(&rotated_k[s]);
                        q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() * scale
                    })
                    .collect();
                for (s, p) in softmax(&scores).into_iter().enumerate() {
                    let v = &kv[s][head * kv_each + c.nope..][..c.v];
                    for (out, v) in out[head * c.v..].iter_mut().zip(v) {
                        *out += p * v;
                    }
                }
            }
        }
        self.linear(&out, &format!("{name}.o_proj"))
    }

    fn feed_forward(&self, h: &Rows, layer: usize, name: &str) -> Rows {
        match self.config {
            ModelConfig::Qwen3Moe(c) if c.sparse[layer] => {
                self.moe(h, name, &|s| qwen_choice(c, s))
            }
            ModelConfig::DeepSeek(c) if layer >= c.dense_layers => {
                let bias = match c.version {
                    DeepSeekVersion::V2 => vec![0.0; c.experts],
                    DeepSeekVersion::V3 => {
                        self.get(&format!("{name}.gate.e_score_correction_bias"))
                    }
                };
                let mut out = self.moe(h, name, &|s| deepseek_choice(c, s, &bias));
                if c.shared_experts > 0 {
                    add(&mut out, &self.mlp(h, &format!("{name}.shared_experts")));
                }
                out
            }
            _ => self.mlp(h, name),
        }
    }

    pub fn mlp(&self, h: &Rows, name: &str) -> Rows {
        let mut gate = self.linear(h, &format!("{name}.gate_proj"));
        let up = self.linear(h, &format!("{name}.up_proj"));
        for (gate, up) in gate.iter_mut().zip(&up) {
            gate.iter_mut().zip(up).for_each(|(g, u)| *g = silu(*g) * u);
        }
        self.linear(&gate, &format!("{name}.down_proj"))
    }

    fn moe(&self, h: &Rows, name: &str, choose: &Choice<'_>) -> Rows {
        let logits = self.linear(h, &format!("{name}.gate"));
        let row = |(h, logits): (&Vec<f64>, &Vec<f64>)| {
            let mut out = vec![0.0; h.len()];
            for (expert, weight) in choose(logits) {
                let y = self.mlp(&vec![h.clone()], &format!("{name}.experts.{expert}"));
                out.iter_mut().zip(&y[0]).for_each(|(o, y)| *o += weight * y);
            }
            out
        };
        if let Some((part, undecided)) = &self.undecided {
            for (token, logits) in undecided.borrow_mut().iter_mut().zip(&logits) {
                *token |= is_undecided(logits, *part, choose);
            }
        }
        h.iter().zip(&logits).map(row).collect()
    }
}

/// Whether other experts would be chosen, were one of the scores off by `part` of their spread.
fn is_undecided(logits: &[f64], part: f64, choose: &Choice<'_>) -> bool {
    let mean = logits.iter().sum::<f64>() / logits.len() as f64;
    let variance = logits.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / logits.len() as f64;
    let chosen = |logits: &[f64]| {
        let mut experts: Vec<usize> = choose(logits).into_iter().map(|(e, _)| e).collect();
        experts.sort_unstable();
        experts
    };
    let (expected, off) = (chosen(logits), part * variance.sqrt());
    (0..logits.len()).flat_map(|at| [(at, off), (at, -off)]).any(|(at, off)| {
        let mut logits = logits.to_vec();
        logits[at] += off;
        chosen(&logits) != expected
    })
}

fn qwen_choice(c: &Qwen3Moe, logits: &[f64]) -> Vec<(usize, f64)> {
    let p = softmax(logits);
    let chosen = top(&p, c.top_k);
    let sum: f64 = if c.norm_topk { chosen.iter().map(|&e| p[e]).sum() } else { 1.0 };
    chosen.into_iter().map(|e| (e, p[e] / sum)).collect()
}

fn deepseek_choice(c: &DeepSeek, logits: &[f64], bias: &[f64]) -> Vec<(usize, f64)> {
    let scores = match c.version {
        DeepSeekVersion::V2 => softmax(logits),
        DeepSeekVersion::V3 => logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
    };
    let mut choice: Vec<f64> = scores.iter().zip(bias).map(|(s, b)| s + b).collect();
    if let Some((groups, kept)) = c.groups {
        let size = c.experts / groups;
        let best = if c.version == DeepSeekVersion::V2 { 1 } else { 2 };
        let group: Vec<f64> =
            choice.chunks(size).map(|g| top(g, best).iter().map(|&i| g[i]).sum()).collect();
        let kept = top(&group, kept);
        for (e, s) in choice.iter_mut().enumerate() {
            if !kept.contains(&(e / size)) {
                *s = f64::NEG_INFINITY;
            }
        }
    }
    let chosen = top(&choice, c.top_k);
    let sum: f64 = if c.norm_topk { chosen.iter().map(|&e| scores[e]).sum() } else { 1.0 };
    chosen.into_iter().map(|e| (e, scores[e] / sum * c.routed_scale)).collect()
}

/// Rotates a head at a position, frequencies from their definitions.
pub fn rotate(x: &mut [f64], position: usize, rope: &RopeConfig) {
    let dim = x.len();
    let mut factor = 1.0;
    let original = x.to_vec();
    for i in 0..dim / 2 {
        let base = rope.theta.powf(-2.0 * i as f64 / dim as f64);
        let frequency = match &rope.scaling {
            RopeScaling::None => base,
            RopeScaling::Linear { factor } => base / factor,
            RopeScaling::Llama3 { factor, low, high, original } => {
                let wavelength = 2.0 * PI / base;
                if wavelength < original / high {
                    base
                } else if wavelength > original / low {
                    base / factor
                } else {
                    let smooth = (original / wavelength - low) / (high - low);
                    (1.0 - smooth) * base / factor + smooth * base
                }
            }
            RopeScaling::Yarn(yarn) => {
                let correction = |rotations: f64| {
                    dim as f64 * (yarn.original / (rotations * 2.0 * PI)).ln()
                        / (2.0 * rope.theta.ln())
                };
                let low = correction(yarn.beta_fast).floor().max(0.0);
                let high = correction(yarn.beta_slow).ceil().min(dim as f64 - 1.0);
                let high = if low == high { high + 0.001 } else { high };
                let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                let get = |strength: f64| 0.1 * strength * yarn.factor.ln() + 1.0;
                factor = match (yarn.mscale, yarn.mscale_all_dim) {
                    (Some(m), Some(all)) if m != 0.0 && all != 0.0 => get(m) / get(all),
                    _ => get(1.0),
                };
                base / yarn.factor * ramp + base * (1.0 - ramp)
            }
        };
        let (sin, cos) = (position as f64 * frequency).sin_cos();
        let (a, b) = if rope.interleaved { (2 * i, 2 * i + 1) } else { (i, i + dim / 2) };
        x[a] = (original[a] * cos - original[b] * sin) * factor;
        x[b] = (original[b] * cos + original[a] * sin) * factor;
    }
}
