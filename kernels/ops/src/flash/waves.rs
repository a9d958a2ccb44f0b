//! Runs pieces on all threads in bounded memory: as many at a time as there are slots, then the
//! splits of each tile are merged in order. A tile that a wave leaves unfinished is carried over.

use super::{Piece, State, Work};
use crate::share::Shared;
use device::ThreadPool;

/// The most pieces of one wave.
const MAX_WAVE: usize = 256;

/// The result's shape and the memory of a piece.
pub(crate) struct Slots<'a> {
    pub(crate) memory: &'a mut [f32],
    /// Elements of a slot: a state first, then what the computation keeps for itself.
    pub(crate) len: usize,
    /// Rows of a state per query row: query heads that share keys.
    pub(crate) lines: usize,
    /// Values of a row.
    pub(crate) width: usize,
}

/// Computes every piece by `compute(piece, state, rest of the slot)`, the state empty before, and
/// hands each tile's merged state to `finish`.
///
/// # Panics
/// When there is no memory for two slots.
pub(crate) fn run(
    pool: &ThreadPool,
    work: &Work<'_>,
    slots: Slots<'_>,
    compute: &(dyn Fn(&Piece, &mut State<'_>, &mut [f32]) + Sync),
    finish: &(dyn Fn(&Piece, &State<'_>) + Sync),
) {
    let Slots { memory, len, lines, width } = slots;
    let capacity = (memory.len() / len.max(1)).min(MAX_WAVE);
    assert!(capacity >= 2, "scratch for two slots of {len} elements, got {}", memory.len());
    let memory = Shared::new(memory);
    let mut pieces = work.pieces();
    let mut wave = [Piece::default(); MAX_WAVE];
    // Slot 0 holds a tile's state from the wave before.
    let mut carried = 0;
    loop {
        let mut count = carried;
        for (slot, piece) in wave[carried..capacity].iter_mut().zip(&mut pieces) {
            *slot = piece;
            count += 1;
        }
        if count == carried {
            return;
        }
        let wave_now = &wave[..count];
        pool.run(count - carried, &|item| {
            let index = item + carried;
            let piece = &wave_now[index];
            // SAFETY: one slot per item.
            let slot = unsafe { memory.part(index * len, len) };
            let (mut state, rest) = State::of(slot, piece.rows * lines, width);
            state.reset();
            compute(piece, &mut state, rest);
            if piece.opens && piece.closes {
                finish(piece, &state);
            }
        });
        let begins = |index: usize| index == 0 || wave_now[index].opens;
        let whole = |index: usize| wave_now[index].opens && wave_now[index].closes;
        if (0..count).any(|index| !whole(index)) {
            pool.run(count, &|index| {
                if !begins(index) || whole(index) {
                    return;
                }
                let rows = wave_now[index].rows * lines;
                // SAFETY: a tile's slots are touched by the item of its first slot only.
                let slot_at = |i: usize| unsafe { memory.part(i * len, len) };
                let (mut state, _) = State::of(slot_at(index), rows, width);
                let mut last = index;
                while last + 1 < count && !begins(last + 1) {
                    last += 1;
                    state.merge(&State::of(slot_at(last), rows, width).0);
                }
                if wave_now[last].closes {
                    finish(&wave_now[last], &state);
                }
            });
        }
        carried = 0;
        if !wave[count - 1].closes {
            let begin = (0..count).rev().find(|index| begins_in(&wave, *index)).unwrap_or(0);
            if begin > 0 {
                // SAFETY: the parallel loops are over, and the two slots differ.
                let (to, from) = unsafe { (memory.part(0, len), memory.part(begin * len, len)) };
                to.copy_from_slice(from);
                wave[0] = wave[begin];
            }
            carried = 1;
        }
    }
}

fn begins_in(wave: &[Piece], index: usize) -> bool {
    index == 0 || wave[index].opens
}
