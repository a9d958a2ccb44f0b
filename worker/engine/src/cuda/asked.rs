//! What requests ask of a draw beyond a row of parameters: counts of what they have seen, biases and
//! bans, on the device with a place for each slot.
//!
//! A slot's place is filled in front of the first draw of its life; from then on draws count their own
//! tokens, so nothing is sent again. It draws nothing. Invariant: a row that names its slot's place is
//! drawn behind the copy that filled it, because all of it goes through one stream.

use super::limits::Limits;
use super::sizes::Sizes;
use crate::batch::Batch;
use crate::executor::{RowDraw, TableView};
use crate::sampler::{LIST_WORDS, MOST_BIASES};
use device::cuda::{Arena, Context, CudaError, DeviceSlice, Upload};
use ids::SlotGeneration;
use ops::cuda::Queue;
use ops::sample::cuda::count_tokens;
use zerocopy::FromBytes;

const OP: &str = "requests' lists";
/// Lives that begin to draw in one step before the host waits for copies.
const STAGES: usize = 4;

/// Pinned memory of one life.
struct Stage {
    known: Upload,
    lists: Upload,
}

/// The places of all slots.
pub(super) struct Asked {
    /// u32 `[slots, vocab]`.
    seen: DeviceSlice,
    /// u32 `[slots, LIST_WORDS]`: tokens of biases, their values, bans.
    lists: DeviceSlice,
    /// u32 `[context]`: tokens of the life that is counted.
    known: DeviceSlice,
    vocab: usize,
    /// Whose places they are, by slot.
    lives: Vec<Option<SlotGeneration>>,
    stages: Vec<Stage>,
    turn: usize,
}

/// Bytes on the device, by part.
pub(super) fn bytes(sizes: &Sizes, limits: &Limits) -> [usize; 3] {
    let words = [
        limits.slots.saturating_mul(sizes.vocab),
        limits.slots.saturating_mul(LIST_WORDS),
        limits.context,
    ];
    words.map(|words| words.saturating_mul(4))
}

/// The lists as the sampler takes them; places in them count from the front of each.
pub(super) struct Lists {
    pub(super) seen: DeviceSlice,
    pub(super) bias: (DeviceSlice, DeviceSlice),
    pub(super) banned: DeviceSlice,
}

impl Asked {
    pub(super) fn take(
        context: &Context,
        arena: &mut Arena,
        sizes: &Sizes,
        limits: &Limits,
    ) -> Result<Self, CudaError> {
        let [seen, lists, known] = bytes(sizes, limits);
        let stage = |_| {
            let lists = Upload::new(context, LIST_WORDS * 4)?;
            Ok(Stage { known: Upload::new(context, known)?, lists })
        };
        Ok(Self {
            seen: arena.take("token counts", seen)?,
            lists: arena.take(OP, lists)?,
            known: arena.take(OP, known)?,
            vocab: sizes.vocab,
            lives: vec![None; limits.slots],
            stages: (0..STAGES).map(stage).collect::<Result<_, CudaError>>()?,
            turn: 0,
        })
    }

    pub(super) fn lists(&self) -> Lists {
        let from = |word: usize| self.lists.slice(word * 4..self.lists.bytes());
        Lists {
            seen: self.seen.clone(),
            bias: (from(0), from(MOST_BIASES)),
            banned: from(2 * MOST_BIASES),
        }
    }

    /// Fills the places of slots that draw with them for the first time in their life. `draws` has one
    /// entry per wanted row.
    pub(super) fn fill(
        &mut self,
        on: Queue<'_>,
        batch: &Batch,
        tables: &TableView<'_>,
        draws: &[Option<RowDraw>],
    ) -> Result<(), CudaError> {
        for (wanted, draw) in batch.wanted.iter().zip(draws) {
            let Some(how) = draw.map(|draw| draw.how) else { continue };
            let lists = how.bias_count > 0 || how.banned_count > 0;
            let (slot, life) = (wanted.slot.index(), tables.life(wanted.slot));
            if !(lists || how.has_penalties()) || self.lives[slot] == life {
                continue;
            }
            self.lives[slot] = life;
            let Some(asked) = tables.asked(wanted.slot) else { continue };
            self.turn = (self.turn + 1) % STAGES;
            let stage = &mut self.stages[self.turn];
            if lists {
                let words = <[u32]>::mut_from_bytes(stage.lists.edit()?).map_err(cast)?;
                asked.state.write_lists(words);
                let place = slot * LIST_WORDS * 4;
                let place = self.lists.slice(place..place + LIST_WORDS * 4);
                stage.lists.send(on.stream, &place)?;
            }
            if how.has_penalties() {
                let place = slot * self.vocab * 4;
                let place = self.seen.slice(place..place + self.vocab * 4);
                on.stream.fill(&place, 0)?;
                let words = <[u32]>::mut_from_bytes(stage.known.edit()?).map_err(cast)?;
                let known = asked.tokens.len();
                let room = words.get_mut(..known);
                room.ok_or_else(|| cast(format!("{known} known tokens")))?
                    .copy_from_slice(asked.tokens);
                let tokens = self.known.slice(0..known * 4);
                stage.known.send(on.stream, &tokens)?;
                count_tokens(on, &tokens, known, asked.prompt, &place, self.vocab)?;
            }
        }
        Ok(())
    }
}

fn cast(error: impl std::fmt::Display) -> CudaError {
    CudaError::Shape { op: OP, why: error.to_string() }
}
