//! A worker that follows plans to the letter and trusts nothing in them.
//!
//! Instead of KV, every position of every block holds the hash of the token history that wrote it.
//! What is stored behind the cache is stored with them and comes back with them. A read checks that hash, a
//! write checks who else may be reading, a grant checks that no step in flight can touch the block. It draws
//! tokens from the history alone. Of a group's plans it follows the section of its shard, which may run
//! nothing. Invariant: a plan that is carried out without complaint has read, in every group, exactly the
//! history of each slot.

use crate::client::{draw, history};
use ids::{
    BLOCK_TOKENS, BlockId, GroupId, Incarnation, RequestId, ShardId, SlotId, StepSeq, TokenId,
    Tokens,
};
use kv_cache::first_live;
use scheduler::Role;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use step::{
    Admit, Carving, GroupSpec, Logprobs, Outcome, PromptLogprobs, Sampled, Sampling, Section,
    SlotOp, SlotRef, StepPlan, StepTiming, TokenLogprob, Upload, WriteSlot,
};

const BLOCK: usize = BLOCK_TOKENS as usize;

#[derive(Clone, Debug)]
struct Page {
    /// History hash by position; 0 where nothing was written since the block was granted.
    content: [u64; BLOCK],
    /// Tables of live slots that name the block.
    holders: u32,
    /// Newest step that ran while a table named the block.
    used: StepSeq,
}

#[derive(Debug, Default)]
struct Table {
    /// Logical number of the first block.
    first: u32,
    /// Blocks, and whether this slot may write them.
    blocks: VecDeque<(BlockId, bool)>,
}

#[derive(Debug)]
struct Slot {
    at: SlotRef,
    request: RequestId,
    sampling: Arc<Sampling>,
    prompt: u32,
    prompt_logprobs: bool,
    tokens: Vec<TokenId>,
    /// `past[i]` names `tokens[..=i]`.
    past: Vec<u64>,
    computed: usize,
    tables: Vec<Table>,
    decoding: bool,
}

/// The worker of one incarnation.
#[derive(Debug)]
pub struct Worker {
    incarnation: Incarnation,
    groups: Vec<GroupSpec>,
    pages: Vec<Vec<Page>>,
    /// By group: what each place of the memory behind the cache holds.
    behind: Vec<Vec<Option<[u64; BLOCK]>>>,
    uploads: BTreeMap<RequestId, Vec<TokenId>>,
    slots: Vec<Option<Slot>>,
    generations: Vec<u32>,
    last: StepSeq,
    shard: ShardId,
    /// Who ran in the last step.
    ran: Vec<(RequestId, Role)>,
}

type Check<T = ()> = Result<T, String>;

fn ensure(holds: bool, what: impl FnOnce() -> String) -> Check {
    if holds { Ok(()) } else { Err(what()) }
}

impl Worker {
    /// A worker with nothing in it.
    #[must_use]
    pub fn new(
        incarnation: Incarnation,
        groups: &[GroupSpec],
        carving: &Carving,
        slots: u32,
    ) -> Self {
        let page = Page { content: [0; BLOCK], holders: 0, used: StepSeq::ZERO };
        let pages = |per: &u32| vec![page.clone(); (carving.supers * per) as usize];
        Self {
            incarnation,
            groups: groups.to_vec(),
            pages: carving.per_super.iter().map(pages).collect(),
            behind: vec![vec![None; carving.host_blocks as usize]; groups.len()],
            uploads: BTreeMap::new(),
            slots: (0..slots).map(|_| None).collect(),
            generations: vec![0; slots as usize],
            last: StepSeq::ZERO,
            shard: ShardId(0),
            ran: Vec::new(),
        }
    }

    /// The same as a rank of this shard.
    #[must_use]
    pub fn of_shard(self, shard: ShardId) -> Self {
        Self { shard, ..self }
    }

    /// Takes tokens ahead of an admission.
    ///
    /// # Errors
    /// When they do not continue what was uploaded.
    pub fn upload(&mut self, upload: &Upload) -> Check {
        ensure(upload.incarnation == self.incarnation, || "upload for another life".into())?;
        let held = self.uploads.entry(upload.request).or_default();
        if upload.offset.is_zero() {
            held.clear();
        }
        ensure(held.len() == upload.offset.as_usize(), || {
            format!("{}: upload at {} after {}", upload.request, upload.offset, held.len())
        })?;
        held.extend_from_slice(&upload.tokens);
        Ok(())
    }

    /// Drops tokens that will not be admitted.
    pub fn forget(&mut self, request: RequestId) {
        self.uploads.remove(&request);
    }

    /// Uploads not yet used.
    #[must_use]
    pub fn uploads(&self) -> usize {
        self.uploads.len()
    }

    /// Requests that have a slot.
    pub fn seated(&self) -> impl Iterator<Item = RequestId> {
        self.slots.iter().flatten().map(|slot| slot.request)
    }

    /// Carries out a plan. `retired` is the newest step whose outcome the planner had seen.
    ///
    /// # Errors
    /// The first thing in the plan that is not safe or not possible.
    pub fn step(&mut self, plan: &StepPlan, retired: StepSeq) -> Check<Outcome> {
        ensure(plan.incarnation == self.incarnation, || "a plan for another life".into())?;
        ensure(plan.seq == self.last.next(), || format!("{} after {}", plan.seq, self.last))?;
        self.last = plan.seq;
        let at = self.shard.index();
        let (Some(section), Some(tokens)) = (plan.sections.get(at), plan.shard_tokens.get(at))
        else {
            return Err(format!("no section for shard {at}"));
        };
        ensure(plan.sections.len() == plan.shard_tokens.len(), || "tokens per shard".into())?;
        for op in &section.ops {
            self.apply(op, retired)?;
        }
        let (sampled, prompt_logprobs, timing) = self.run(section)?;
        ensure(*tokens == Tokens(timing.tokens), || {
            format!("{tokens} tokens announced, {} run", timing.tokens)
        })?;
        // Ranks without work run the bucket of those that have most.
        let most = plan.shard_tokens.iter().max().copied().unwrap_or_default();
        ensure(plan.bucket >= most, || format!("bucket {} for {most}", plan.bucket))?;
        ensure(!most.is_zero(), || "a step that runs nothing anywhere".into())?;
        // A step in which its shard stands still is none that the shard's scheduler counts.
        let runs = !tokens.is_zero();
        for slot in self.slots.iter().flatten().filter(|_| runs) {
            for (table, pages) in slot.tables.iter().zip(&mut self.pages) {
                for (block, _) in &table.blocks {
                    pages[block.index()].used = plan.seq;
                }
            }
        }
        Ok(Outcome {
            seq: plan.seq,
            incarnation: plan.incarnation,
            sampled,
            prompt_logprobs,
            timing,
            digest: plan.seq.0,
        })
    }

    /// Who ran in the last step, and what.
    #[must_use]
    pub fn ran(&self) -> &[(RequestId, Role)] {
        &self.ran
    }

    fn apply(&mut self, op: &SlotOp, retired: StepSeq) -> Check {
        match op {
            SlotOp::Admit(admit) => self.admit(admit),
            SlotOp::Extend { slot, blocks } => {
                for grant in blocks {
                    self.extend(*slot, *grant, retired)?;
                }
                Ok(())
            }
            SlotOp::Trim { slot, group, first_live } => self.trim(*slot, *group, *first_live),
            SlotOp::Retire { slot } => {
                let cell = self.slots.get_mut(slot.index()).ok_or("no such slot")?;
                let gone = cell.take().ok_or_else(|| format!("{slot}: retired while empty"))?;
                for (table, pages) in gone.tables.iter().zip(&mut self.pages) {
                    for (block, _) in &table.blocks {
                        pages[block.index()].holders -= 1;
                    }
                }
                Ok(())
            }
            SlotOp::Store { group, block, at } => {
                let page = &self.pages[group.index()][block.index()];
                ensure(!page.content.contains(&0), || {
                    format!("block {block} of group {group} is stored before it is full")
                })?;
                self.behind[group.index()][at.index()] = Some(page.content);
                Ok(())
            }
            SlotOp::Load { at, block } => {
                let held = self.behind[block.group.index()][at.index()];
                let held = held.ok_or_else(|| format!("nothing was stored in place {at}"))?;
                let page = self.grant(*block, retired)?;
                page.content = held;
                Ok(())
            }
        }
    }

    fn admit(&mut self, admit: &Admit) -> Check {
        let SlotRef { slot, generation } = admit.slot;
        let tokens = self.uploads.remove(&admit.request);
        let tokens = tokens.ok_or_else(|| format!("{}: not uploaded", admit.request))?;
        ensure(tokens.len() == admit.known.as_usize(), || {
            format!("{}: {} tokens, {} uploaded", admit.request, admit.known, tokens.len())
        })?;
        ensure(admit.cached < admit.known, || "a hit left nothing to compute".into())?;
        ensure(admit.cached.0.is_multiple_of(BLOCK_TOKENS), || "a hit inside a block".into())?;
        ensure(generation.0 > self.generations[slot.index()], || {
            format!("{slot}: generation {generation} again")
        })?;
        ensure(self.slots[slot.index()].is_none(), || format!("{slot}: admitted twice"))?;
        self.generations[slot.index()] = generation.0;
        let mut past = Vec::with_capacity(tokens.len());
        for token in &tokens {
            past.push(history(past.last().copied().unwrap_or(0), *token));
        }
        ensure(admit.tables.len() == self.groups.len(), || "a table per group".into())?;
        let mut tables = Vec::new();
        for (table, pages) in admit.tables.iter().zip(&mut self.pages) {
            let end = table.skipped as usize + table.blocks.len();
            ensure(end == admit.cached.blocks_full().as_usize(), || {
                format!("{slot}: the prefix of group {} ends at block {end}", table.group)
            })?;
            for (logical, block) in (table.skipped as usize..).zip(&table.blocks) {
                let page = &mut pages[block.index()];
                ensure(page.content == past[logical * BLOCK..(logical + 1) * BLOCK], || {
                    format!("{slot}: shared block {block} of group {} is wrong", table.group)
                })?;
                page.holders += 1;
            }
            let blocks = table.blocks.iter().map(|block| (*block, false)).collect();
            tables.push(Table { first: table.skipped, blocks });
        }
        self.slots[slot.index()] = Some(Slot {
            at: admit.slot,
            request: admit.request,
            sampling: admit.sampling.clone(),
            prompt: admit.prompt.0,
            prompt_logprobs: admit.prompt_logprobs.is_some(),
            tokens,
            past,
            computed: admit.cached.as_usize(),
            tables,
            decoding: false,
        });
        Ok(())
    }

    /// A block that nobody holds and no step under way touches.
    fn grant(&mut self, grant: WriteSlot, retired: StepSeq) -> Check<&mut Page> {
        let WriteSlot { group, block } = grant;
        let page = &mut self.pages[group.index()][block.index()];
        let name = || format!("block {block} of group {group}");
        ensure(page.holders == 0, || format!("{}, granted while in a table", name()))?;
        ensure(page.used <= retired, || {
            format!("{}, used by step {}, granted at {retired}", name(), page.used)
        })?;
        Ok(page)
    }

    fn extend(&mut self, slot: SlotId, grant: WriteSlot, retired: StepSeq) -> Check {
        let WriteSlot { group, block } = grant;
        let page = self.grant(grant, retired).map_err(|what| format!("{slot}: {what}"))?;
        page.holders = 1;
        page.content = [0; BLOCK];
        let slot = self.slots[slot.index()].as_mut().ok_or("extended while empty")?;
        slot.tables[group.index()].blocks.push_back((block, true));
        Ok(())
    }

    fn trim(&mut self, slot: SlotId, group: GroupId, first_live: u32) -> Check {
        let slot = self.slots[slot.index()].as_mut().ok_or("trimmed while empty")?;
        let table = &mut slot.tables[group.index()];
        while table.first < first_live {
            let (block, _) = table.blocks.pop_front().ok_or("trimmed past its end")?;
            self.pages[group.index()][block.index()].holders -= 1;
            table.first += 1;
        }
        Ok(())
    }

    #[allow(clippy::type_complexity)]
    fn run(&mut self, section: &Section) -> Check<(Vec<Sampled>, Vec<PromptLogprobs>, StepTiming)> {
        for slot in &section.decode.leave {
            let slot = self.slots[slot.index()].as_mut().ok_or("an empty slot leaves")?;
            ensure(slot.decoding, || "a slot leaves twice".into())?;
            slot.decoding = false;
        }
        let prefilled: Vec<SlotId> = section.prefill.iter().map(|run| run.slot).collect();
        for slot in &section.decode.join {
            let slot = self.slots[slot.index()].as_mut().ok_or("an empty slot joins")?;
            ensure(!slot.decoding, || "a slot joins twice".into())?;
            slot.decoding = true;
        }
        let (mut sampled, mut logprobs) = (Vec::new(), Vec::new());
        self.ran.clear();
        let mut timing = StepTiming::default();
        for run in &section.prefill {
            ensure(!run.tokens.is_zero(), || "an empty chunk".into())?;
            let (mine, request) = self.advance(run.slot, run.tokens.as_usize(), &mut logprobs)?;
            ensure(mine == run.sample, || format!("{request}: sample is {}", run.sample))?;
            if run.sample {
                sampled.push(self.sample(run.slot)?);
            }
            timing.prefill_tokens += run.tokens.0;
            let (tokens, sample) = (run.tokens, run.sample);
            self.ran.push((request, Role::Prefill { tokens, sample }));
        }
        for id in 0..u32::try_from(self.slots.len()).unwrap_or(u32::MAX) {
            let id = SlotId(id);
            let decodes = self.slots[id.index()].as_ref().is_some_and(|slot| slot.decoding);
            if decodes && !prefilled.contains(&id) {
                let (last, request) = self.advance(id, 1, &mut logprobs)?;
                ensure(last, || format!("{request}: decodes inside its prompt"))?;
                sampled.push(self.sample(id)?);
                timing.tokens += 1;
                self.ran.push((request, Role::Decode));
            }
        }
        timing.tokens += timing.prefill_tokens;
        Ok((sampled, logprobs, timing))
    }

    /// Runs `n` tokens of a slot: writes their KV, reads their past. Returns whether they end the
    /// known tokens.
    fn advance(
        &mut self,
        id: SlotId,
        n: usize,
        logprobs: &mut Vec<PromptLogprobs>,
    ) -> Check<(bool, RequestId)> {
        let slot = self.slots[id.index()].as_mut().ok_or("an empty slot runs")?;
        let (start, end) = (slot.computed, slot.computed + n);
        let name = format!("{} in slot {id}", slot.request);
        ensure(end <= slot.tokens.len(), || format!("{name}: runs past its tokens"))?;
        for ((table, pages), spec) in slot.tables.iter().zip(&mut self.pages).zip(&self.groups) {
            let group = spec.group;
            let block_of = |position: usize| {
                let at = (position / BLOCK).checked_sub(table.first as usize);
                let found = at.and_then(|at| table.blocks.get(at)).copied();
                found.ok_or_else(|| format!("{name}: no block of group {group} for {position}"))
            };
            for position in start..end {
                let (block, own) = block_of(position)?;
                let page = &mut pages[block.index()];
                ensure(own && page.holders == 1, || {
                    format!("{name}: writes block {block} of group {group}, which others hold")
                })?;
                page.content[position % BLOCK] = slot.past[position];
            }
            // Exactly the positions that the first query and all later ones read.
            let from = match spec.kind {
                step::GroupKind::Full => 0,
                step::GroupKind::Sliding { window } => {
                    (start + 1).saturating_sub(window.0 as usize)
                }
            };
            debug_assert!(from >= first_live(spec.kind, Tokens(start as u32)).tokens().as_usize());
            let mut position = from;
            while position < end {
                let (block, _) = block_of(position)?;
                let stop = end.min((position / BLOCK + 1) * BLOCK);
                let written = &pages[block.index()].content[position % BLOCK..][..stop - position];
                ensure(written == &slot.past[position..stop], || {
                    format!("{name}: reads block {block} of group {group}, not its own past")
                })?;
                position = stop;
            }
        }
        slot.computed = end;
        let told = end.min(slot.prompt as usize - 1);
        if slot.prompt_logprobs && start < told {
            let entry = |token: &TokenId| {
                let chosen = TokenLogprob { token: *token, logprob: -1.0, rank: 1 };
                Logprobs { chosen, top: Vec::new() }
            };
            logprobs.push(PromptLogprobs {
                request: slot.request,
                first: Tokens(start as u32 + 1),
                entries: slot.tokens[start + 1..=told].iter().map(entry).collect(),
            });
        }
        Ok((end == slot.tokens.len(), slot.request))
    }

    fn sample(&mut self, id: SlotId) -> Check<Sampled> {
        let slot = self.slots[id.index()].as_mut().ok_or("an empty slot samples")?;
        let past = slot.past.last().copied().unwrap_or(0);
        let token = draw(slot.sampling.seed, slot.sampling.choice, past);
        slot.tokens.push(token);
        slot.past.push(history(past, token));
        let SlotRef { slot, generation } = slot.at;
        Ok(Sampled { slot, generation, token, fault: None, logprobs: None })
    }
}
