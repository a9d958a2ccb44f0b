//! KV blocks as plain lists: what each one is doing, and under which tokens it can be found.
//!
//! What is forgotten goes behind the cache where there is room for it, and comes back when it is found there.
//! Blocks are found by the whole token history they hold, never by a hash, and every figure is
//! counted anew when it is asked for. It is slow on purpose. Invariant: a super-block is on the
//! lists that its blocks' states say, after every move.

use ids::{BLOCK_TOKENS, BlockHash, BlockId, GroupId, TierSlot, TokenId};
use scheduler::WorkerReady;
use step::{GroupKind, SlotOp, WriteSlot};

const BLOCK: usize = BLOCK_TOKENS as usize;

/// What a block is doing. Numbers are steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    Free,
    Written,
    Read {
        holders: u32,
    },
    /// Named and unused, but a step up to this one may still read it.
    Resting {
        until: u64,
    },
    /// Named and unused.
    Spare,
    /// Nameless and unused, but a step up to this one may still touch it.
    Limbo {
        until: u64,
    },
}

/// A sequence from its start to a block's end.
type Name = (BlockHash, Vec<TokenId>);

#[derive(Clone, Debug)]
struct Block {
    doing: Doing,
    /// What the block can be found under, if it can be found.
    name: Option<Name>,
}

/// A place behind the cache that holds something.
#[derive(Debug)]
struct Behind {
    place: u32,
    name: Name,
    /// Whether it is about to be copied back.
    wanted: bool,
}

#[derive(Debug)]
struct Group {
    kind: GroupKind,
    per_super: u32,
    blocks: Vec<Block>,
    /// Oldest first.
    resting: Vec<u32>,
    spare: Vec<u32>,
    limbo: Vec<u32>,
    /// Super-blocks with a free block, in the order in which they are used.
    open: Vec<u32>,
    /// Super-blocks that could be emptied, longest so first.
    idle: Vec<u32>,
    /// By super-block: blocks never handed out since it was bound start here.
    fresh: Vec<u32>,
    /// By super-block: blocks that came back; the last is handed out first.
    back: Vec<Vec<u32>>,
    /// Places behind the cache that hold something; the first that is not wanted is overwritten first.
    behind: Vec<Behind>,
}

/// The cache of one life.
#[derive(Debug)]
pub(super) struct Cache {
    groups: Vec<Group>,
    /// Which group each super-block belongs to.
    bound: Vec<Option<usize>>,
    /// Super-blocks of nobody; the last is taken first.
    empty: Vec<u32>,
    /// Places behind the cache, for each group.
    places: u32,
    /// Copies that the worker was not told of.
    pub(super) copies: Vec<SlotOp>,
    pub(super) launched: u64,
    pub(super) retired: u64,
}

/// A request's blocks in one group, in logical order.
#[derive(Clone, Debug, Default)]
pub(super) struct Table {
    /// Logical blocks before the first.
    pub(super) skipped: u32,
    /// Blocks, and whether they are read-only.
    pub(super) blocks: Vec<(u32, bool)>,
}

impl Table {
    pub(super) fn end(&self) -> u32 {
        self.skipped + self.blocks.len() as u32
    }
}

/// First logical block that the query at `position` reads.
pub(super) fn first_read(kind: GroupKind, position: u32) -> u32 {
    match kind {
        GroupKind::Full => 0,
        GroupKind::Sliding { window } => {
            (position + 1).saturating_sub(window.0.max(1)) / BLOCK_TOKENS
        }
    }
}

impl Cache {
    pub(super) fn new(ready: &WorkerReady) -> Self {
        let supers = ready.carving.supers;
        let group = |(spec, per): (&step::GroupSpec, &u32)| Group {
            kind: spec.kind,
            per_super: *per,
            blocks: vec![Block { doing: Doing::Free, name: None }; (supers * per) as usize],
            resting: Vec::new(),
            spare: Vec::new(),
            limbo: Vec::new(),
            open: Vec::new(),
            idle: Vec::new(),
            fresh: vec![0; supers as usize],
            back: vec![Vec::new(); supers as usize],
            behind: Vec::new(),
        };
        Self {
            groups: ready.groups.iter().zip(&ready.carving.per_super).map(group).collect(),
            bound: vec![None; supers as usize],
            empty: (0..supers).rev().collect(),
            places: ready.carving.host_blocks,
            copies: Vec::new(),
            launched: 0,
            retired: 0,
        }
    }

    pub(super) fn groups(&self) -> usize {
        self.groups.len()
    }

    pub(super) fn kind(&self, group: usize) -> GroupKind {
        self.groups[group].kind
    }

    /// Blocks of a group that a sequence of so many tokens occupies at once.
    pub(super) fn most_held(&self, group: usize, tokens: u32) -> u32 {
        let all = tokens.div_ceil(BLOCK_TOKENS);
        match self.groups[group].kind {
            GroupKind::Full => all,
            GroupKind::Sliding { window } => {
                all.min(window.0.saturating_sub(1).div_ceil(BLOCK_TOKENS) + 1)
            }
        }
    }

    /// Super-blocks that a sequence of so many tokens needs, and how many there are.
    pub(super) fn supers_for(&self, tokens: u32) -> (u64, u64) {
        let supers = |g: usize| self.most_held(g, tokens).div_ceil(self.groups[g].per_super.max(1));
        ((0..self.groups.len()).map(|g| u64::from(supers(g))).sum(), self.bound.len() as u64)
    }

    fn free_in(&self, group: usize, at: u32) -> u32 {
        let g = &self.groups[group];
        g.per_super - g.fresh[at as usize] + g.back[at as usize].len() as u32
    }

    fn free(&self, group: usize) -> u32 {
        let mine = (0..self.bound.len()).filter(|at| self.bound[*at] == Some(group));
        mine.map(|at| self.free_in(group, at as u32)).sum()
    }

    pub(super) fn mintable(&self, group: usize) -> u32 {
        let elsewhere = (0..self.groups.len()).filter(|g| *g != group);
        let idle: usize = elsewhere.map(|g| self.groups[g].idle.len()).sum();
        let supers = (self.empty.len() + idle) as u32;
        let g = &self.groups[group];
        self.free(group) + g.spare.len() as u32 + supers * g.per_super
    }

    pub(super) fn arriving(&self, group: usize) -> u32 {
        (self.groups[group].limbo.len() + self.groups[group].resting.len()) as u32
    }

    /// Puts a bound super-block on the lists where it belongs now.
    fn file(&mut self, group: usize, at: u32) {
        let free = self.free_in(group, at);
        let g = &mut self.groups[group];
        if free == g.per_super {
            g.open.retain(|s| *s != at);
            g.idle.retain(|s| *s != at);
            g.fresh[at as usize] = 0;
            g.back[at as usize].clear();
            self.bound[at as usize] = None;
            self.empty.push(at);
            return;
        }
        let blocks = &g.blocks[(at * g.per_super) as usize..((at + 1) * g.per_super) as usize];
        let idle = blocks.iter().all(|b| matches!(b.doing, Doing::Free | Doing::Spare));
        if !idle {
            g.idle.retain(|s| *s != at);
        } else if !g.idle.contains(&at) {
            g.idle.push(at);
        }
        if free == 0 {
            g.open.retain(|s| *s != at);
        } else if !g.open.contains(&at) {
            g.open.insert(0, at);
        }
    }

    fn set(&mut self, group: usize, block: u32, doing: Doing) {
        let g = &mut self.groups[group];
        for list in [&mut g.resting, &mut g.spare, &mut g.limbo] {
            list.retain(|b| *b != block);
        }
        match doing {
            Doing::Resting { .. } => g.resting.push(block),
            Doing::Spare => g.spare.push(block),
            Doing::Limbo { .. } => g.limbo.push(block),
            Doing::Free => {
                let at = (block / g.per_super) as usize;
                g.back[at].push(block);
            }
            Doing::Written | Doing::Read { .. } => {}
        }
        g.blocks[block as usize].doing = doing;
        let at = block / g.per_super;
        self.file(group, at);
    }

    /// A block to write, if there is one that nobody uses.
    pub(super) fn mint(&mut self, group: usize, frugal: bool) -> Option<u32> {
        if frugal && self.free(group) == 0 {
            self.drop_oldest(group);
        }
        loop {
            if self.groups[group].open.is_empty()
                && let Some(at) = self.empty.pop()
            {
                self.bound[at as usize] = Some(group);
                self.groups[group].open.push(at);
            }
            let g = &mut self.groups[group];
            if let Some(at) = g.open.first().copied() {
                let block = g.back[at as usize].pop().unwrap_or_else(|| {
                    g.fresh[at as usize] += 1;
                    at * g.per_super + g.fresh[at as usize] - 1
                });
                self.set(group, block, Doing::Written);
                return Some(block);
            }
            if !self.drop_oldest(group) && !self.empty_another(group) {
                return None;
            }
        }
    }

    fn drop_oldest(&mut self, group: usize) -> bool {
        let oldest = self.groups[group].spare.first().copied();
        oldest.inspect(|block| self.evict(group, *block)).is_some()
    }

    /// Empties the longest idle super-block of the first other group that has one.
    fn empty_another(&mut self, group: usize) -> bool {
        for other in (0..self.groups.len()).filter(|g| *g != group) {
            let Some(at) = self.groups[other].idle.first().copied() else { continue };
            let per = self.groups[other].per_super;
            for block in at * per..(at + 1) * per {
                if self.groups[other].blocks[block as usize].doing == Doing::Spare {
                    self.evict(other, block);
                }
            }
            return true;
        }
        false
    }

    fn evict(&mut self, group: usize, block: u32) {
        let b = &mut self.groups[group].blocks[block as usize];
        let (doing, name) = (b.doing, b.name.take());
        name.into_iter().for_each(|name| self.put_behind(group, block, name));
        let doing = match doing {
            Doing::Resting { .. } => Doing::Limbo { until: self.launched },
            _ => Doing::Free,
        };
        self.set(group, block, doing);
    }

    /// What a block held goes behind the cache, unless it is there already: into a place never used, else
    /// over the first that nobody wants.
    fn put_behind(&mut self, group: usize, block: u32, name: Name) {
        let behind = &mut self.groups[group].behind;
        if let Some(at) = behind.iter().position(|b| b.name == name) {
            let there = behind.remove(at);
            behind.push(there);
            return;
        }
        let used = behind.len() as u32;
        let place = match behind.iter().position(|b| !b.wanted) {
            _ if used < self.places => used,
            Some(first) => behind.remove(first).place,
            None => return,
        };
        behind.push(Behind { place, name, wanted: false });
        let (group, block, at) = (GroupId(group as u8), BlockId(block), TierSlot(place));
        self.copies.push(SlotOp::Store { group, block, at });
    }

    /// Forgets everything that nobody uses.
    pub(super) fn purge(&mut self) {
        for group in 0..self.groups.len() {
            let g = &self.groups[group];
            let all: Vec<u32> = g.spare.iter().chain(&g.resting).copied().collect();
            all.into_iter().for_each(|block| self.evict(group, block));
        }
    }

    fn find(&self, group: usize, root: BlockHash, tokens: &[TokenId]) -> Option<u32> {
        let named =
            |b: &Block| b.name.as_ref().is_some_and(|(salt, name)| *salt == root && name == tokens);
        self.groups[group].blocks.iter().position(named).map(|at| at as u32)
    }

    /// Ends writing; the block holds the last tokens of the sequence.
    pub(super) fn seal(&mut self, group: usize, block: u32, root: BlockHash, tokens: &[TokenId]) {
        if self.find(group, root, tokens).is_none() {
            self.groups[group].blocks[block as usize].name = Some((root, tokens.to_vec()));
        }
        self.set(group, block, Doing::Read { holders: 1 });
    }

    /// Gives a block back.
    pub(super) fn give_back(&mut self, group: usize, block: u32) {
        let b = &self.groups[group].blocks[block as usize];
        let (launched, over) = (self.launched, self.launched <= self.retired);
        let doing = match b.doing {
            Doing::Read { holders } if holders > 1 => Doing::Read { holders: holders - 1 },
            _ if b.name.is_some() && over => Doing::Spare,
            _ if b.name.is_some() => Doing::Resting { until: launched },
            _ if over => Doing::Free,
            _ => Doing::Limbo { until: launched },
        };
        self.set(group, block, doing);
    }

    /// A step is over: what waited for it is there again.
    pub(super) fn reclaim(&mut self) {
        let retired = self.retired;
        for group in 0..self.groups.len() {
            let over = |list: &[u32], blocks: &[Block]| -> Vec<u32> {
                let done = |b: &&u32| match blocks[**b as usize].doing {
                    Doing::Limbo { until } | Doing::Resting { until } => until <= retired,
                    _ => false,
                };
                list.iter().filter(done).copied().collect()
            };
            let g = &self.groups[group];
            let (limbo, resting) = (over(&g.limbo, &g.blocks), over(&g.resting, &g.blocks));
            limbo.into_iter().for_each(|block| self.set(group, block, Doing::Free));
            resting.into_iter().for_each(|block| self.set(group, block, Doing::Spare));
        }
    }

    /// The most leading blocks of a sequence, up to `most`, after which every group has all that
    /// it reads of the past.
    pub(super) fn hit(&self, root: BlockHash, tokens: &[TokenId], most: u32) -> u32 {
        let there = |group: usize, block: u32| {
            let tokens = &tokens[..(block as usize + 1) * BLOCK];
            let mut behind = self.groups[group].behind.iter();
            self.find(group, root, tokens).is_some()
                || behind.any(|b| b.name.0 == root && b.name.1 == tokens)
        };
        let supports = |boundary: u32| {
            (0..self.groups.len()).all(|group| {
                let first = first_read(self.groups[group].kind, boundary * BLOCK_TOKENS);
                (first..boundary).all(|block| there(group, block))
            })
        };
        (0..=most).rev().find(|boundary| supports(*boundary)).unwrap_or(0)
    }

    /// Blocks of a hit that nobody uses, or for which one is to be taken.
    pub(super) fn taken_by(
        &self,
        group: usize,
        root: BlockHash,
        tokens: &[TokenId],
        hit: u32,
    ) -> u32 {
        let first = first_read(self.groups[group].kind, hit * BLOCK_TOKENS);
        let spare = |block: &u32| {
            let found = self.find(group, root, &tokens[..(*block as usize + 1) * BLOCK]);
            let doing = found.map(|b| self.groups[group].blocks[b as usize].doing);
            doing.is_none_or(|doing| doing == Doing::Spare)
        };
        (first..hit).filter(spare).count() as u32
    }

    /// Takes the blocks of a hit; those behind the cache are copied into new ones. Says which group is
    /// short where there is none; then nothing is taken.
    pub(super) fn take_hit(
        &mut self,
        root: BlockHash,
        tokens: &[TokenId],
        hit: u32,
        frugal: bool,
    ) -> Result<Vec<Table>, usize> {
        let mut tables = self.take_found(root, tokens, hit);
        let mut absent: Vec<(usize, Name)> = Vec::new();
        for (group, table) in tables.iter().enumerate() {
            let names = (table.skipped..hit).map(|b| &tokens[..(b as usize + 1) * BLOCK]);
            let missing = names.filter(|tokens| self.find(group, root, tokens).is_none());
            absent.extend(missing.map(|tokens| (group, (root, tokens.to_vec()))));
        }
        for (group, name) in &absent {
            let behind = self.groups[*group].behind.iter_mut();
            behind.filter(|b| b.name == *name).for_each(|b| b.wanted = true);
        }
        let mut short = None;
        for (group, name) in absent {
            let block = if short.is_none() { self.mint(group, frugal) } else { None };
            let behind = &mut self.groups[group].behind;
            let Some(at) = behind.iter().position(|b| b.name == name) else { continue };
            let there = behind.remove(at);
            let at = TierSlot(there.place);
            behind.insert(0, Behind { wanted: false, ..there });
            let Some(block) = block else {
                short = short.or(Some(group));
                continue;
            };
            let grant = WriteSlot { group: GroupId(group as u8), block: BlockId(block) };
            self.copies.push(SlotOp::Load { at, block: grant });
            let nth = name.1.len() / BLOCK - 1 - tables[group].skipped as usize;
            self.seal(group, block, root, &name.1);
            tables[group].blocks.insert(nth, (block, true));
        }
        let Some(short) = short else { return Ok(tables) };
        self.give_all_back(&tables);
        Err(short)
    }

    /// Gives a request's blocks back, last groups and last blocks first.
    pub(super) fn give_all_back(&mut self, tables: &[Table]) {
        for (group, table) in tables.iter().enumerate().rev() {
            table.blocks.iter().rev().for_each(|(block, _)| self.give_back(group, *block));
        }
    }

    /// Takes those blocks of a hit that are in the cache.
    fn take_found(&mut self, root: BlockHash, tokens: &[TokenId], hit: u32) -> Vec<Table> {
        let mut tables = Vec::new();
        for group in 0..self.groups.len() {
            let skipped = first_read(self.groups[group].kind, hit * BLOCK_TOKENS);
            let mut table = Table { skipped, blocks: Vec::new() };
            for logical in skipped..hit {
                let name = &tokens[..(logical as usize + 1) * BLOCK];
                let Some(block) = self.find(group, root, name) else { continue };
                let holders = match self.groups[group].blocks[block as usize].doing {
                    Doing::Read { holders } => holders,
                    _ => 0,
                };
                self.set(group, block, Doing::Read { holders: holders + 1 });
                table.blocks.push((block, true));
            }
            tables.push(table);
        }
        tables
    }
}
