//! Contexts of 64k tokens against exact arithmetic, within seconds: a model of one layer has as many
//! different keys and values, rotations apart, as there are tokens in its vocabulary.

use super::naive::{self, Naive, Rows, add, rms, rotate, softmax};
use super::roundings::Roundings;
use super::{Model, Setup, greedy, native, over, prompt};
use model::config::{Gqa, ModelConfig};
use serde_json::{Value, json};

/// Tokens of the prompt; more follow.
const CONTEXT: usize = 1 << 16;
const OUTPUT: usize = 8;
const LAYER: &str = "model.layers.0";

/// A prompt of 64k tokens in chunks, then decodes; positions at the beginning, at borders of blocks
/// and chunks and at the end.
pub fn a_long_context_agrees(base: Setup) {
    for (name, config) in native() {
        let model = Model::new(&one_layer(config), 31);
        let setup = Setup {
            slots: 4,
            tokens: 8192,
            context: CONTEXT as u32 + 64,
            supers: (CONTEXT as u32 / 64 + 8) / 3 + 1,
            ..base
        };
        let tokens = prompt(CONTEXT - 5, 17);
        let got = model.session(setup).complete(&tokens, 8192, OUTPUT, greedy());
        let all: Vec<u32> = tokens.iter().chain(&got.tokens).copied().collect();
        let given: Vec<f32> = got.prompt.iter().chain(&got.logprobs).copied().collect();
        assert_eq!(given.len(), all.len() - 1, "{name}");

        let borders = [63, 64, 8191, 8192, 16_384, 40_000, 57_343, 57_344];
        let mut positions: Vec<usize> = (0..3).chain(borders).collect();
        positions.extend(all.len() - 1 - 2 * OUTPUT..all.len() - 1);
        let expected = logprobs_at(&model, &all, &positions);
        let roundings = Roundings::of(&model.config, model.weights, &tokens[..30]);
        let off = positions.iter().zip(&expected).map(|(at, row)| {
            let exact = row[all[at + 1] as usize];
            (exact - f64::from(given[*at])).abs()
        });
        let dense = Roundings { routed: false, ..roundings };
        dense.explain(off.collect(), &format!("64k tokens, {name}"));
    }
}

/// The arithmetic here is the naive model's.
pub fn the_exact_model_is_the_naive_one() {
    for (name, config) in native() {
        let model = Model::new(&one_layer(config), 31);
        let tokens = prompt(90, 3);
        let positions = [0, 1, 40, 89];
        let exact = logprobs_at(&model, &tokens, &positions);
        let expected = naive::logprobs(&model.config, model.weights, &tokens);
        for (at, row) in positions.into_iter().zip(&exact) {
            let off = row.iter().zip(&expected[at]).map(|(a, b)| (a - b).abs());
            let off = off.fold(0.0, f64::max);
            assert!(off < 1e-9, "{name} at {at}: {off}");
        }
    }
}

/// Experts' choices would hide what attention does.
fn one_layer(config: Value) -> Value {
    over(
        config,
        json!({"num_hidden_layers": 1, "max_position_embeddings": CONTEXT + 64,
            "first_k_dense_replace": 1}),
    )
}

/// Keys and values of a layer.
struct Cache {
    kv_heads: usize,
    scale: f64,
    /// Part of keys that depends on the token alone, `[vocab][kv_heads * width]`.
    still: (Rows, usize),
    /// Rotated part, `[tokens][heads of it * width]`, one head for all or one each.
    rotated: (Rows, usize),
    /// `[vocab][kv_heads * width]`.
    values: (Rows, usize),
}

/// Log-probabilities after the tokens at `positions`.
fn logprobs_at(model: &Model, tokens: &[u32], positions: &[usize]) -> Rows {
    let naive = Naive::new(&model.config, model.weights);
    let decoder = model.config.decoder();
    let table = naive.get("model.embed_tokens.weight");
    let words: Rows = table.chunks_exact(decoder.hidden).map(<[f64]>::to_vec).collect();
    let normed = naive.norm(&words, &format!("{LAYER}.input_layernorm"), decoder.norm_eps);
    let at = |rows: &Rows| -> Rows {
        positions.iter().map(|at| rows[tokens[*at] as usize].clone()).collect()
    };
    let (cache, queries) = project(&naive, &normed, tokens, positions);
    let attended: Vec<Vec<f64>> = (positions.iter().zip(&queries))
        .map(|(at, q)| attend(&cache, &tokens[..=*at], q))
        .collect();

    let mut x = at(&words);
    add(&mut x, &naive.linear(&attended, &format!("{LAYER}.self_attn.o_proj")));
    let h = naive.norm(&x, &format!("{LAYER}.post_attention_layernorm"), decoder.norm_eps);
    add(&mut x, &naive.mlp(&h, &format!("{LAYER}.mlp")));
    let h = naive.norm(&x, "model.norm", decoder.norm_eps);
    let logits = naive.linear(&h, if decoder.tied { "model.embed_tokens" } else { "lm_head" });
    logits.iter().map(|row| softmax(row).into_iter().map(f64::ln).collect()).collect()
}

/// Grouped-query attention, and what its heads are normed with where they are.
const fn grouped(config: &ModelConfig) -> Option<(&Gqa, Option<f64>)> {
    match config {
        ModelConfig::Qwen3(c) => Some((&c.attention, Some(c.decoder.norm_eps))),
        ModelConfig::Llama(c) => Some((&c.attention, None)),
        _ => None,
    }
}

/// A layer's cache, and queries of `positions`, heads side by side with what is rotated last.
fn project(naive: &Naive<'_>, words: &Rows, tokens: &[u32], positions: &[usize]) -> (Cache, Rows) {
    let linear = |x: &Rows, name: &str| naive.linear(x, &format!("{LAYER}.self_attn.{name}"));
    let at = |rows: &Rows| -> Rows {
        positions.iter().map(|at| rows[tokens[*at] as usize].clone()).collect()
    };
    match (grouped(naive.config), naive.config) {
        (Some((c, eps)), _) => {
            let d = c.head_dim;
            let normed = |mut rows: Rows, name: &str| {
                let Some(eps) = eps else { return rows };
                let weight = naive.get(&format!("{LAYER}.self_attn.{name}.weight"));
                for head in rows.iter_mut().flat_map(|row| row.chunks_exact_mut(d)) {
                    let normed = rms(head, &weight, eps);
                    head.copy_from_slice(&normed);
                }
                rows
            };
            let turn = |mut row: Vec<f64>, at: usize| {
                row.chunks_exact_mut(d).for_each(|head| rotate(head, at, &c.rope));
                row
            };
            let k = normed(linear(words, "k_proj"), "k_norm");
            let q = at(&normed(linear(words, "q_proj"), "q_norm"));
            let turned = tokens.iter().enumerate().map(|(at, t)| turn(k[*t as usize].clone(), at));
            let cache = Cache {
                kv_heads: c.kv_heads,
                scale: 1.0 / (d as f64).sqrt(),
                still: (vec![vec![]; words.len()], 0),
                rotated: (turned.collect(), d),
                values: (linear(words, "v_proj"), d),
            };
            (cache, q.into_iter().zip(positions).map(|(q, at)| turn(q, *at)).collect())
        }
        (None, ModelConfig::DeepSeek(c)) => {
            let c = &c.attention;
            let kv_a = linear(words, "kv_a_proj_with_mqa");
            let latent: Rows = kv_a.iter().map(|row| row[..c.latent].to_vec()).collect();
            let latent = naive.norm(&latent, &format!("{LAYER}.self_attn.kv_a_layernorm"), 1e-6);
            let kv = linear(&latent, "kv_b_proj");
            let part = |from: usize, width: usize| -> Rows {
                let heads = |row: &Vec<f64>| {
                    let each = row.chunks_exact(c.nope + c.v);
                    each.flat_map(|head| head[from..from + width].to_vec()).collect()
                };
                kv.iter().map(heads).collect()
            };
            let turned = tokens.iter().enumerate().map(|(at, t)| {
                let mut k = kv_a[*t as usize][c.latent..].to_vec();
                rotate(&mut k, at, &c.rope);
                k
            });
            let mut queries = at(&linear(words, "q_proj"));
            for (q, at) in queries.iter_mut().zip(positions) {
                for head in q.chunks_exact_mut(c.nope + c.rope_dim) {
                    rotate(&mut head[c.nope..], *at, &c.rope);
                }
            }
            let cache = Cache {
                kv_heads: c.heads,
                scale: 1.0 / ((c.nope + c.rope_dim) as f64).sqrt(),
                still: (part(0, c.nope), c.nope),
                rotated: (turned.collect(), c.rope_dim),
                values: (part(c.nope, c.v), c.v),
            };
            (cache, queries)
        }
        (None, other) => panic!("no long contexts of {other:?}"),
    }
}

/// What a query of one position, of all heads, sees in `tokens`.
fn attend(cache: &Cache, tokens: &[u32], q: &[f64]) -> Vec<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let (still, rotated, values) = (&cache.still, &cache.rotated, &cache.values);
    let (width, heads) = (still.1 + rotated.1, q.len() / (still.1 + rotated.1));
    let head = |(head, q): (usize, &[f64])| -> Vec<f64> {
        let kv = head / (heads / cache.kv_heads);
        let by_token: Vec<f64> =
            still.0.iter().map(|k| dot(&q[..still.1], &k[kv * still.1..])).collect();
        let scores: Vec<f64> = (tokens.iter().zip(&rotated.0))
            .map(|(token, k)| {
                let own = kv * rotated.1 % k.len();
                (by_token[*token as usize] + dot(&q[still.1..], &k[own..])) * cache.scale
            })
            .collect();
        let mut out = vec![0.0; values.1];
        for (token, p) in tokens.iter().zip(softmax(&scores)) {
            let v = &values.0[*token as usize][kv * values.1..];
            out.iter_mut().zip(v).for_each(|(out, v)| *out += p * v);
        }
        out
    };
    q.chunks_exact(width).enumerate().flat_map(head).collect()
}
