//! The slot table: what the worker knows of each admitted request, changed only by plans.
//!
//! Every change is checked against the state it meets; a plan that does not fit is an error by
//! name. It runs no model. Invariant: of an admitted slot, `computed < known`, and every table
//! holds a block for each computed token that may still be read.

use crate::PlanError;
use crate::copies::{BlockCopy, Way};
use crate::sampler::SamplerState;
use crate::tables::{Carver, Tables};
use ids::{BLOCK_TOKENS, RequestId, SlotGeneration, SlotId, TokenId, Tokens};
use std::collections::BTreeMap;
use std::sync::Arc;
use step::{Admit, PrefillRun, Sampling, Section, SlotOp, Upload, WriteSlot};

/// A row of the table.
#[derive(Debug)]
pub(crate) struct Slot {
    /// The life, or the last one; `None` before the first.
    pub(crate) generation: Option<SlotGeneration>,
    /// Who lives here.
    pub(crate) life: Option<Life>,
    /// Where its KV lies.
    pub(crate) tables: Tables,
}

/// An admitted request.
#[derive(Debug)]
pub(crate) struct Life {
    pub(crate) request: RequestId,
    /// Tokens known at admission.
    pub(crate) tokens: Vec<u32>,
    /// How many of `tokens` are the client's prompt.
    pub(crate) prompt: Tokens,
    /// The last token sampled, once there is one.
    pub(crate) last: Option<TokenId>,
    /// Tokens known: those of admission and those sampled since.
    pub(crate) known: Tokens,
    /// Tokens with KV.
    pub(crate) computed: Tokens,
    pub(crate) sampling: Arc<Sampling>,
    pub(crate) prompt_logprobs: Option<u8>,
    pub(crate) sampler: SamplerState,
    /// Tokens of `known` that a device has drawn or will, and the host has not seen.
    pending: u32,
    decodes: bool,
    /// The last step this slot ran in, so that no step runs it twice.
    ran: u64,
}

impl Life {
    /// The token at a position: given at admission, or the last one sampled. `None` where only the
    /// device knows it.
    pub(crate) fn token(&self, position: u32) -> Option<u32> {
        let sampled = || (self.pending == 0).then(|| self.last.map_or(0, |token| token.0));
        self.tokens.get(position as usize).copied().or_else(sampled)
    }

    /// Takes a sampled token.
    pub(crate) fn accept(&mut self, token: TokenId) {
        self.await_token();
        self.settle(token);
    }

    /// Counts a token that a device draws.
    pub(crate) fn await_token(&mut self) {
        self.known += Tokens(1);
        self.pending += 1;
    }

    /// Takes the oldest token that was waited for.
    pub(crate) fn settle(&mut self, token: TokenId) {
        self.pending -= 1;
        self.last = Some(token);
        self.sampler.record(token);
    }
}

/// All slots, uploads and the decode set.
#[derive(Debug)]
pub(crate) struct Slots {
    rows: Vec<Slot>,
    uploads: BTreeMap<RequestId, Vec<u32>>,
    /// In the order of joining.
    decoding: Vec<SlotId>,
    carver: Carver,
    /// Of the last section that was applied, in order.
    copies: Vec<BlockCopy>,
    vocab: u32,
    max_context: Tokens,
    step: u64,
}

impl Slots {
    pub(crate) fn new(carver: Carver, max_slots: u32, max_context: Tokens, vocab: u32) -> Self {
        // One block more: a plan that runs ahead of an end may ask for it.
        let blocks = max_context.blocks_ceil().as_usize() + 1;
        let row = || Slot {
            generation: None,
            life: None,
            tables: Tables::with_capacity(carver.groups(), blocks),
        };
        Self {
            rows: (0..max_slots).map(|_| row()).collect(),
            uploads: BTreeMap::new(),
            decoding: Vec::with_capacity(max_slots as usize),
            carver,
            copies: Vec::new(),
            vocab,
            max_context,
            step: 0,
        }
    }

    pub(crate) fn row(&self, slot: SlotId) -> &Slot {
        &self.rows[slot.index()]
    }

    /// The life in a slot that ran in this step.
    pub(crate) fn life_mut(&mut self, slot: SlotId) -> Result<&mut Life, PlanError> {
        let row = self.rows.get_mut(slot.index());
        row.and_then(|row| row.life.as_mut()).ok_or(PlanError::NotAdmitted { slot })
    }

    /// The life of this generation, if the slot still has it.
    pub(crate) fn life_of(
        &mut self,
        slot: SlotId,
        generation: SlotGeneration,
    ) -> Option<&mut Life> {
        let row = self.rows.get_mut(slot.index())?;
        row.life.as_mut().filter(|_| row.generation == Some(generation))
    }

    /// Copies that the last section asks for, to be carried out in order before it runs.
    pub(crate) fn copies(&self) -> &[BlockCopy] {
        &self.copies
    }

    /// Slots that decode.
    pub(crate) fn decoding(&self) -> &[SlotId] {
        &self.decoding
    }

    pub(crate) fn upload(&mut self, upload: &Upload) -> Result<(), PlanError> {
        let (request, vocab) = (upload.request, self.vocab);
        let held = self.uploads.entry(request).or_default();
        if upload.offset.is_zero() {
            held.clear();
        }
        let gap = held.len() != upload.offset.as_usize();
        if gap || held.len() + upload.tokens.len() > self.max_context.as_usize() {
            let held = Tokens(held.len() as u32);
            return Err(PlanError::UploadGap { request, offset: upload.offset, held });
        }
        if let Some(unknown) = upload.tokens.iter().find(|token| token.0 >= vocab) {
            return Err(PlanError::UnknownToken { request, token: unknown.0, vocab });
        }
        held.extend(upload.tokens.iter().map(|token| token.0));
        Ok(())
    }

    pub(crate) fn forget(&mut self, request: RequestId) {
        self.uploads.remove(&request);
    }

    /// Applies a section's ops and marks who leaves and joins the decode set, in the plan's order.
    pub(crate) fn apply(&mut self, section: &Section) -> Result<(), PlanError> {
        self.step += 1;
        self.copies.clear();
        for op in &section.ops {
            match op {
                SlotOp::Admit(admit) => self.admit(admit)?,
                SlotOp::Extend { slot, blocks } => {
                    self.life(*slot)?;
                    let row = &mut self.rows[slot.index()];
                    for block in blocks {
                        row.tables.push(&self.carver, *slot, block.group, block.block)?;
                    }
                }
                SlotOp::Trim { slot, group, first_live } => {
                    self.life(*slot)?;
                    self.rows[slot.index()].tables.trim(*group, *first_live)?;
                }
                SlotOp::Retire { slot } => {
                    self.life(*slot)?;
                    let row = &mut self.rows[slot.index()];
                    row.life = None;
                    row.tables.clear();
                    self.decoding.retain(|decoding| decoding != slot);
                }
                SlotOp::Store { group, block, at } => {
                    self.copies.push(self.carver.copy(Way::Store, *group, *block, *at)?);
                }
                SlotOp::Load { at, block: WriteSlot { group, block } } => {
                    self.copies.push(self.carver.copy(Way::Load, *group, *block, *at)?);
                }
            }
        }
        for &slot in &section.decode.leave {
            let life = self.life_mut(slot)?;
            if !core::mem::replace(&mut life.decodes, false) {
                return Err(PlanError::DecodeSet { slot, inside: false });
            }
            self.decoding.retain(|&decoding| decoding != slot);
        }
        for &slot in &section.decode.join {
            let life = self.life_mut(slot)?;
            if core::mem::replace(&mut life.decodes, true) {
                return Err(PlanError::DecodeSet { slot, inside: true });
            }
            self.decoding.push(slot);
        }
        Ok(())
    }

    fn life(&self, slot: SlotId) -> Result<&Life, PlanError> {
        let slots = self.rows.len();
        let row = self.rows.get(slot.index()).ok_or(PlanError::NoSlot { slot, slots })?;
        row.life.as_ref().ok_or(PlanError::NotAdmitted { slot })
    }

    fn admit(&mut self, admit: &Admit) -> Result<(), PlanError> {
        let (slot, request) = (admit.slot.slot, admit.request);
        let slots = self.rows.len();
        let row = self.rows.get_mut(slot.index()).ok_or(PlanError::NoSlot { slot, slots })?;
        if let Some(life) = &row.life {
            return Err(PlanError::Occupied { slot, request: life.request });
        }
        if let Some(last) = row.generation.filter(|&last| !newer(admit.slot.generation, last)) {
            return Err(PlanError::StaleGeneration { slot, got: admit.slot.generation, last });
        }
        let held = Tokens(self.uploads.get(&request).map_or(0, Vec::len) as u32);
        let tokens = self.uploads.remove(&request).unwrap_or_default();
        if held != admit.known || held.is_zero() {
            return Err(PlanError::NotUploaded { request, known: admit.known, held });
        }
        let wrong = |what| Err(PlanError::Admission { slot, what });
        if admit.prompt > admit.known || admit.prompt.is_zero() {
            return wrong("the prompt is empty or longer than the known tokens");
        }
        if admit.cached >= admit.known {
            return wrong("nothing is left to compute");
        }
        let most = self.max_context.0.min(self.vocab) as usize;
        let sampler = SamplerState::new(&admit.sampling, &tokens, admit.prompt.as_usize(), most);
        row.tables.clear();
        for table in &admit.tables {
            row.tables.skip(slot, table.group, table.skipped)?;
            for &block in &table.blocks {
                row.tables.push(&self.carver, slot, table.group, block)?;
            }
        }
        // What is said to be cached must have blocks, and those that will be read must be alive.
        row.tables.check(&self.carver, slot, admit.cached, admit.cached)?;
        row.generation = Some(admit.slot.generation);
        row.life = Some(Life {
            request,
            sampler,
            tokens,
            prompt: admit.prompt,
            last: None,
            known: admit.known,
            computed: admit.cached,
            sampling: Arc::clone(&admit.sampling),
            prompt_logprobs: admit.prompt_logprobs,
            pending: 0,
            decodes: false,
            ran: 0,
        });
        Ok(())
    }

    /// Starts a chunk: checks it and counts its tokens as computed. Returns where it starts.
    pub(crate) fn start_chunk(&mut self, run: &PrefillRun) -> Result<Tokens, PlanError> {
        let PrefillRun { slot, tokens, sample } = *run;
        let life = self.life(slot)?;
        let (computed, known) = (life.computed, life.known);
        let left = known - computed;
        if tokens.is_zero() || tokens > left || (sample && tokens != left) {
            return Err(PlanError::Chunk { slot, tokens, computed, known, sample });
        }
        self.start(slot, tokens)
    }

    /// Starts a decode of one token, unless the slot joined by a chunk of this very step.
    pub(crate) fn start_decode(&mut self, slot: SlotId) -> Result<Option<Tokens>, PlanError> {
        let step = self.step;
        let life = self.life(slot)?;
        if life.ran == step {
            return Ok(None);
        }
        if life.computed + Tokens(1) != life.known {
            let (computed, known) = (life.computed, life.known);
            return Err(PlanError::NotReady { slot, computed, known });
        }
        self.start(slot, Tokens(1)).map(Some)
    }

    fn start(&mut self, slot: SlotId, tokens: Tokens) -> Result<Tokens, PlanError> {
        let step = self.step;
        let row = &mut self.rows[slot.index()];
        let Some(life) = &mut row.life else { return Err(PlanError::NotAdmitted { slot }) };
        if life.ran == step {
            return Err(PlanError::RunsTwice { slot });
        }
        let from = life.computed;
        row.tables.check(&self.carver, slot, from, from + tokens)?;
        life.ran = step;
        life.computed = from + tokens;
        Ok(from)
    }
}

/// Whether `got` comes after `last`; generations wrap.
const fn newer(got: SlotGeneration, last: SlotGeneration) -> bool {
    got.0.wrapping_sub(last.0).wrapping_sub(1) < u32::MAX / 2
}

/// Tokens that a table may hold at most; positions are 32 bits and blocks 64 tokens.
pub(crate) const MAX_CONTEXT: u32 = u32::MAX / 2 / BLOCK_TOKENS * BLOCK_TOKENS;
