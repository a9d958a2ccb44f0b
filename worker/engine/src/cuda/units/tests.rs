//! Every form that steps run a program's units in, walked through without a device: what a launch writes lies
//! apart from all that it reads and writes beside, and what a launch reads is still what was written there.
//!
//! Which norms are left to other launches is asked of `fold` itself. What a launch reads and stores is described
//! here as `run` and `moe_layer` launch it; who adds a form describes it, too.
//! Memory that is no activation is not followed: the cache, choices of experts and scratch.

use super::*;
use crate::cuda::fold::{self, Walker};
use crate::cuda::launch::{Place, Region};
use crate::cuda::rest;
use crate::cuda::weights::product;
use model::lower::{BufferId, lower};
use model::mesh::{Mesh, Rank};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::fs;
use std::path::{Path, PathBuf};

/// What blocks of a launch do with activations, in no order.
#[derive(Clone, Debug, Default)]
struct Launched {
    reads: Vec<BufferId>,
    /// Changed where they lie: each row by the block that has it, or elements that no other block reads.
    changes: Vec<BufferId>,
    writes: Vec<BufferId>,
}

impl Launched {
    fn new(reads: &[BufferId], changes: &[BufferId], writes: &[BufferId]) -> Self {
        let [reads, changes, writes] = [reads, changes, writes].map(<[_]>::to_vec);
        Self { reads, changes, writes }
    }

    fn stored(&self) -> impl Iterator<Item = BufferId> {
        self.changes.iter().chain(&self.writes).copied()
    }

    fn all(&self) -> impl Iterator<Item = BufferId> {
        self.reads.iter().copied().chain(self.stored())
    }
}

/// How a step runs its units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// Up to eight rows of short contexts: norms are made by products, and all is in one launch that can be.
    Few { folds: bool },
    /// Rows that decode, or many: activations with their products, shared experts with the routed ones.
    Joined,
    /// Prompts, and operands that fast kernels do not take: ops by themselves, shared experts beside.
    Apart,
}

const FORMS: [Form; 4] =
    [Form::Few { folds: true }, Form::Few { folds: false }, Form::Joined, Form::Apart];

/// A norm that the next launch makes.
#[derive(Clone, Copy)]
struct Fold {
    x: BufferId,
    out: BufferId,
}

struct Walk<'a> {
    lowered: &'a Lowered,
    region: Region,
    form: Form,
    /// Buffers whose values lie where they were written.
    held: Vec<BufferId>,
    /// What was walked through, so that nothing is right because it was not there.
    seen: BTreeSet<&'static str>,
    faults: Vec<String>,
}

impl Walk<'_> {
    fn apart(&self, a: BufferId, b: BufferId) -> bool {
        let [a, b] = [a, b].map(|id| Place::of(self.lowered, self.region, id));
        a.is_apart(b)
    }

    /// Names alone say what kind of fault it is; where buffers lie depends on widths.
    fn fault(&mut self, what: &str, ids: &[BufferId]) {
        let names: Vec<_> = ids.iter().map(|id| self.lowered.buffers[id.0].name).collect();
        self.faults.push(format!("{:?}: {what}: {names:?}", self.form));
    }

    fn launch(&mut self, reads: &[BufferId], changes: &[BufferId], writes: &[BufferId]) {
        self.enqueue(&Launched::new(reads, changes, writes));
    }

    fn enqueue(&mut self, launched: &Launched) {
        let all: Vec<_> = launched.all().collect();
        let stored: Vec<_> = launched.stored().collect();
        // What is stored stands last in `all`, so that each pair with something stored is seen once.
        let reads = launched.reads.len();
        for (i, to) in stored.iter().enumerate() {
            for other in &all[..reads + i] {
                if !self.apart(*to, *other) {
                    self.fault("one launch stores over", &[*to, *other]);
                }
            }
        }
        for read in launched.reads.iter().chain(&launched.changes) {
            if !self.held.contains(read) {
                self.fault("is read where something else was written", &[*read]);
            }
        }
        for to in stored {
            let mut held = std::mem::take(&mut self.held);
            held.retain(|other| *other != to && self.apart(*other, to));
            held.push(to);
            self.held = held;
        }
    }

    /// Launches on two streams.
    fn beside(&mut self, ours: &[Launched], theirs: &[Launched]) {
        for one in ours {
            for other in theirs {
                for (a, b) in [(one, other), (other, one)] {
                    for to in a.stored() {
                        for id in b.all() {
                            if !self.apart(to, id) {
                                self.fault("stored beside", &[to, id]);
                            }
                        }
                    }
                }
            }
        }
        ours.iter().chain(theirs).for_each(|launched| self.enqueue(launched));
    }

    /// What an op launches by itself; nothing where the product in front makes its result.
    fn op(&self, op: &Op) -> Option<Launched> {
        let uses = op.uses();
        Some(match *op {
            Op::AddNorm { delta, residual, out, .. } => {
                Launched::new(&[delta], &[residual], &[out])
            }
            Op::Add { x, target } => Launched::new(&[x], &[target], &[]),
            Op::HeadNorm { x, .. } | Op::Rope { x, .. } | Op::AllReduce { x, .. } => {
                Launched::new(&[], &[x], &[])
            }
            Op::Linear { x, out, .. } => {
                product(self.lowered, op)?;
                let pair = self.lowered.pairs.iter().find(|pair| pair.contains(&out));
                Launched::new(&[x], &[], pair.map_or(&[out], |pair| pair))
            }
            _ => Launched {
                reads: uses.reads,
                writes: uses.writes.into_iter().collect(),
                ..Launched::default()
            },
        })
    }

    fn unit(&mut self, unit: Unit<'_>, norm: Option<Fold>) {
        match unit {
            Unit::One(op) => match (self.op(op), norm) {
                (Some(Launched { writes, .. }), Some(Fold { x, out })) => {
                    self.launch(&[x], &[], &[&[out], writes.as_slice()].concat());
                }
                (Some(launched), None) => self.enqueue(&launched),
                (None, norm) => assert!(norm.is_none(), "a norm for no product"),
            },
            Unit::Gated([product, act]) => {
                self.seen.insert("activation");
                let (Op::Linear { x, .. }, Op::SiluMul { out, .. }) = (product, act) else {
                    panic!("{product:?} and {act:?}")
                };
                match (self.form, norm) {
                    (_, Some(Fold { x, out: normed })) => self.launch(&[x], &[], &[normed, *out]),
                    (Form::Apart, None) => self.one_by_one(&[product, act]),
                    _ => self.launch(&[*x], &[], &[*out]),
                }
            }
            Unit::Block(found) => self.block(&found),
            Unit::Grouped(ops) => self.grouped(ops),
            Unit::Moe(_) => unreachable!("layers of experts have their own"),
        }
    }

    fn one_by_one(&mut self, ops: &[&Op]) {
        for op in ops {
            self.op(op).iter().for_each(|launched| self.enqueue(launched));
        }
    }

    fn block(&mut self, found: &Found<'_>) {
        self.seen.insert("block");
        let [.., Op::WriteKv { rows: kv, .. }, Op::Attention { q, out, .. }] = found.apart else {
            panic!("a block")
        };
        let (q, kv, out) = (*q, *kv, *out);
        match self.form {
            // Queries are rotated in each head's own blocks.
            Form::Few { .. } => self.launch(&[q, kv], &[], &[out]),
            // Blocks that rotate parts of queries, and others that read the other parts; then pieces of keys
            // and values.
            Form::Joined => {
                self.launch(&[kv], &[q], &[]);
                self.launch(&[q], &[], &[]);
                self.launch(&[], &[], &[out]);
                self.launch(&[q, kv], &[], &[]);
            }
            // Keys in front; rows that decode; prompts that are expanded, and those behind contexts.
            Form::Apart => {
                self.launch(&[], &[q, kv], &[]);
                self.launch(&[q], &[], &[out]);
                self.launch(&[q, kv], &[out], &[]);
                self.launch(&[q], &[out], &[]);
            }
        }
    }

    fn grouped(&mut self, ops: &[Op]) {
        self.seen.insert("grouped");
        let [.., Op::WriteKv { rows: kv, .. }, Op::Attention { q, out, .. }] = ops else {
            panic!("grouped-query attention")
        };
        let (q, kv, out) = (*q, *kv, *out);
        if self.form != Form::Apart {
            return self.launch(&[q, kv], &[], &[out]);
        }
        // Keys and queries in front, rows that decode, prompts.
        self.launch(&[kv], &[q], &[]);
        self.launch(&[q], &[], &[out]);
        self.launch(&[q], &[out], &[]);
    }

    /// As `Step::moe`, with the norm in front made by the router and the one behind left out where asked.
    fn moe(&mut self, found: &moe_layer::Found<'_>, norm: Option<Fold>, unnormed: bool) {
        self.seen.insert(if found.shared.is_some() { "shared" } else { "experts" });
        let [score @ Op::Linear { x, out: logits, .. }, Op::Route { .. }] = found.routing else {
            panic!("a router")
        };
        let ((x, logits), (residual, out)) = ((*x, *logits), behind(found));
        let routed = [Launched::new(&[logits], &[], &[]), Launched::new(&[x], &[], &[])];
        if matches!(self.form, Form::Few { .. }) {
            self.unit(Unit::One(score), norm);
            // Shared experts come along, and their results are not stored.
            self.launch(&[x, logits], &[residual], &[]);
            if !unnormed {
                self.launch(&[residual], &[], &[out]);
            }
            return;
        }
        let scored = self.op(score).expect("a product");
        let Some((ops, result)) = found.shared else {
            self.beside(&[&[scored], routed.as_slice()].concat(), &[]);
            return self.launch(&[], &[residual], &[out]);
        };
        let [_, Op::SiluMul { out: inner, .. }, _] = ops else { panic!("shared experts") };
        if self.form == Form::Joined {
            self.beside(&[&[scored], &routed[..1]].concat(), &[]);
            // What is between their products is read by blocks that wait for those that write it.
            self.launch(&[x], &[], &[*inner, result]);
        } else {
            let theirs: Vec<_> = ops.iter().filter_map(|op| self.op(op)).collect();
            self.beside(&[&[scored], routed.as_slice()].concat(), &theirs);
        }
        self.launch(&[result], &[residual], &[out]);
    }
}

/// The way is that of steps; what each launch reads and stores is described above.
impl<'a> Walker<Unit<'a>> for Walk<'_> {
    type Norm<'u>
        = Fold
    where
        'a: 'u;
    type Error = Infallible;

    fn norm(&self, unit: &Unit<'a>) -> Option<Fold> {
        let Unit::One(Op::Norm { x, out, .. }) = unit else { return None };
        Some(Fold { x: *x, out: *out })
    }

    fn sum(&self, product: &Unit<'a>, norm: &Unit<'a>) -> Option<Fold> {
        let Unit::One(Op::Linear { out: sum, .. }) = product else { return None };
        let Unit::One(Op::AddNorm { delta, residual, out, .. }) = norm else { return None };
        (sum == delta).then_some(Fold { x: *residual, out: *out })
    }

    fn last(&self, unit: &Unit<'a>) -> Option<Fold> {
        let Unit::Moe(found) = unit else { return None };
        let (x, out) = behind(found);
        Some(Fold { x, out })
    }

    fn folds(&self, unit: &Unit<'a>, norm: &Fold) -> bool {
        let folds = self.form == Form::Few { folds: true };
        folds && read_by_product(unit) == Some(norm.out)
    }

    fn add(&mut self, product: &Unit<'a>, norm: &Fold) -> Result<bool, Infallible> {
        let Unit::One(Op::Linear { x, .. }) = product else { return Ok(false) };
        self.seen.insert("sum");
        self.launch(&[*x], &[norm.x], &[]);
        Ok(true)
    }

    fn run_one(
        &mut self,
        unit: &Unit<'a>,
        norm: Option<&Fold>,
        unnormed: bool,
    ) -> Result<(), Infallible> {
        self.seen.extend(norm.map(|_| "folded"));
        match unit {
            Unit::Moe(found) => self.moe(found, norm.copied(), unnormed),
            unit => self.unit(*unit, norm.copied()),
        }
        Ok(())
    }
}

/// What a unit's product reads, where it can norm its rows.
fn read_by_product(unit: &Unit<'_>) -> Option<BufferId> {
    match unit {
        Unit::One(Op::Linear { x, .. })
        | Unit::Gated([Op::Linear { x, .. }, _])
        | Unit::Moe(moe_layer::Found { routing: [Op::Linear { x, .. }, _], .. }) => Some(*x),
        Unit::One(_) | Unit::Gated(_) | Unit::Moe(_) | Unit::Block(_) | Unit::Grouped(_) => None,
    }
}

/// The residual that a layer of experts adds to, and its norm.
fn behind(found: &moe_layer::Found<'_>) -> (BufferId, BufferId) {
    let Op::AddNorm { residual, out, .. } = found.norm else { panic!("a norm behind") };
    (*residual, *out)
}

/// What is wrong with body and head of a program, in any form.
fn faults(lowered: &Lowered, dtype: Dtype, seen: &mut BTreeSet<&'static str>) -> Vec<String> {
    let mut faults = Vec::new();
    for form in FORMS {
        let mut walk = |region, units: &[Unit<'_>], held, result| {
            let mut walk =
                Walk { lowered, region, form, held, seen: BTreeSet::new(), faults: Vec::new() };
            walk.seen.extend((!lowered.pairs.is_empty()).then_some("pair"));
            let Ok(()) = fold::walk(&mut walk, units);
            if !walk.held.contains(&result) {
                walk.fault("is not there at the end", &[result]);
            }
            seen.append(&mut walk.seen);
            faults.append(&mut walk.faults);
        };
        let body = split(lowered, &lowered.body, dtype);
        walk(Region::Body, &body, Vec::new(), lowered.hidden);
        // The head's rows are copied into it.
        let head = split(lowered, &lowered.head, dtype);
        walk(Region::Head, &head, vec![lowered.chosen], lowered.logits);
        // Rows of what is carried over are copied to other memory, and nothing else.
        let Some(carried) = rest::carried(lowered) else { continue };
        let attends = |unit: &Unit<'_>| match unit {
            Unit::Block(_) | Unit::Grouped(_) => true,
            Unit::One(op) => matches!(op, Op::Attention { .. }),
            Unit::Gated(_) | Unit::Moe(_) => false,
        };
        let last = body.iter().rposition(attends).expect("an attention");
        walk(Region::Body, &body[last + 1..], carried.clone(), lowered.hidden);
        for (at, one) in carried.iter().enumerate() {
            let place = |id| Place::of(lowered, Region::Body, id);
            let apart = carried[..at].iter().all(|other| place(*other).is_apart(place(*one)));
            assert!(apart && place(*one).row == place(*one).width, "{carried:?}");
            seen.insert("rest");
        }
    }
    faults
}

/// Configurations of the goldens and of the models that recipes are for.
fn configs() -> Vec<(PathBuf, Value)> {
    let folders = |of: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(of).unwrap_or_else(|error| panic!("{}: {error}", of.display()));
        entries.map(|entry| entry.expect("an entry").path()).filter(|path| path.is_dir()).collect()
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let families = folders(&root.join("control-plane/tokenmill/tests/parity/cases"));
    let cases = families.iter().flat_map(|family| folders(family));
    let mut found = Vec::new();
    for folder in cases.chain(folders(&root.join("recipes"))) {
        let Ok(text) = fs::read_to_string(folder.join("config.json")) else { continue };
        let mut config: Value = serde_json::from_str(&text).expect("a config");
        // Later layers are like those before.
        let layers = config["num_hidden_layers"].as_u64().expect("layers").min(3);
        config["num_hidden_layers"] = json!(layers);
        if let Some(types) = config.get_mut("layer_types").and_then(Value::as_array_mut) {
            types.truncate(layers as usize);
        }
        found.push((folder, config));
    }
    found
}

/// A configuration with other widths: of the stream, so that queries are wider or narrower; of what lies
/// between products; with biases; with shared experts or without.
fn variants(config: &Value) -> Vec<Value> {
    let mut all = vec![config.clone()];
    let mut vary = |name: &str, values: &[Value]| {
        if config.get(name).is_none() && !name.ends_with("bias") {
            return;
        }
        let with = |value: &Value| {
            let value = value.clone();
            all.iter()
                .cloned()
                .map(move |mut config: Value| {
                    config[name] = value.clone();
                    config
                })
                .collect::<Vec<_>>()
        };
        let more: Vec<_> = values.iter().flat_map(with).collect();
        all.extend(more);
    };
    vary("hidden_size", &[json!(64), json!(6144)]);
    vary("intermediate_size", &[json!(32)]);
    vary("moe_intermediate_size", &[json!(16)]);
    vary("attention_bias", &[json!(true)]);
    vary("n_shared_experts", &[json!(0), json!(1)]);
    vary("q_lora_rank", &[json!(null), json!(2048)]);
    all
}

fn meshes() -> [Mesh; 5] {
    let mesh = |tp, expert_parallel| Mesh { dp: 1, tp, expert_parallel };
    [Mesh::SINGLE, mesh(2, false), mesh(4, false), mesh(2, true), mesh(4, true)]
}

#[test]
fn launches_store_nothing_where_others_of_their_blocks_read() {
    let (mut programs, mut seen) = (0, BTreeSet::new());
    let mut faulty = BTreeMap::<String, usize>::new();
    let configs = configs();
    for (folder, config) in &configs {
        let before = programs;
        for variant in variants(config) {
            let Ok(parsed) = model::config::parse(&variant.to_string()) else { continue };
            for mesh in meshes() {
                let program = model::families::program(&parsed.config, mesh.expert_parallel);
                let Ok(mut lowered) = lower(&program, mesh, Rank(0), 64) else { continue };
                // The executor is of one rank: parts of others give it widths, and no sums.
                lowered.body.retain(|op| !matches!(op, Op::AllReduce { .. }));
                programs += 1;
                for dtype in [Dtype::Bf16, Dtype::F32] {
                    for kind in faults(&lowered, dtype, &mut seen) {
                        *faulty.entry(kind).or_default() += 1;
                    }
                }
            }
        }
        assert!(programs > before, "{} cannot be lowered", folder.display());
    }
    assert!(configs.len() >= 20 && programs > 1_000, "{} and {programs}", configs.len());
    assert!(faulty.is_empty(), "{faulty:#?}");
    let all =
        ["activation", "block", "experts", "folded", "grouped", "pair", "rest", "shared", "sum"];
    assert_eq!(seen, all.into());
}
