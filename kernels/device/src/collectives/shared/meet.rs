//! How ranks meet: posts, bells, waits, and what stops everybody.
//!
//! A rank sleeps on its own bell, which rings with every post of a member, when someone leaves and when all
//! are stopped; so nothing that ends a wait can be missed. Who waits writes down for whom, so that a timeout
//! names the rank that is missing and not one that waits for it too. Invariant: the first cause of a stop
//! stays, and every rank hears it.

use super::super::{CollectiveError, Kind, NAME};
use super::region::{Map, Presence, block, header};
use core::sync::atomic::Ordering;
use rustix::thread::futex;
use std::time::{Duration, Instant};

/// What a rank does, as it tells the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Meeting {
    pub(super) group: usize,
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    /// Bytes of an element.
    pub(super) width: usize,
    pub(super) bytes: u64,
    pub(super) step: u64,
}

/// A post of a group: its number; then, for two numbers in turn, what it was for.
const NUMBER: usize = 0;
const ABOUT: usize = 8;
const POST: usize = 64;

/// A wait: the rank waited for and one more, the group, its number; then what for, and the group's name.
const FOR: usize = 0;
const GROUP: usize = 4;
const AWAITED: usize = 8;
const WHAT: usize = 16;
const BYTES: usize = 24;
const CALLED: usize = 32;

/// A stop: its state, its kind; ranks and numbers, or a text.
const STATE: usize = 0;
const CAUSE: usize = 4;
const MISSING: usize = 8;
const WAITING: usize = 12;
const STOP_WHAT: usize = 16;
const STOP_BYTES: usize = 24;
const STOP_CALLED: usize = 32;
const WAITED: usize = 40;
const TEXT_LEN: usize = 48;
const TEXT: usize = 64;
const MAX_TEXT: usize = 320;

/// States of a stop.
const NONE: u32 = 0;
const WRITING: u32 = 1;
const TOLD: u32 = 2;

/// Causes of a stop.
const LATE: u32 = 1;
const LEFT: u32 = 2;
const SAID: u32 = 3;

/// How long a cause may take to be written by somebody who may have died doing it.
const TELLING: Duration = Duration::from_secs(1);

/// Kind, width and step in a word.
const fn what(kind: Kind, width: usize, step: u64) -> u64 {
    (kind as u64) << 56 | (width as u64) << 48 | step & STEP
}

const STEP: u64 = (1 << 48) - 1;

fn op(what: u64) -> &'static str {
    Kind::of((what >> 56) as u8).map_or("an operation", Kind::name)
}

/// A name in a word.
fn packed(name: &str) -> u64 {
    let mut bytes = [0; NAME];
    bytes.iter_mut().zip(name.bytes()).for_each(|(to, byte)| *to = byte);
    u64::from_le_bytes(bytes)
}

fn unpacked(word: u64) -> String {
    let bytes = word.to_le_bytes();
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// Whether a group has come to `number`; numbers wrap.
const fn reached(posted: u32, number: u32) -> bool {
    posted.wrapping_sub(number) < u32::MAX / 2
}

impl Map {
    const fn post_at(&self, rank: usize, group: usize, word: usize) -> usize {
        self.block(rank, block::POSTS + group * POST + word)
    }

    const fn wait_at(&self, rank: usize, word: usize) -> usize {
        self.block(rank, block::WAIT + word)
    }

    fn posted(&self, rank: usize, group: usize) -> u32 {
        self.word(self.post_at(rank, group, NUMBER)).load(Ordering::SeqCst)
    }

    /// Says that the stage of `number` may be read, and what it is for.
    pub(super) fn post(&self, rank: usize, meeting: &Meeting, number: u32) {
        let about = self.post_at(rank, meeting.group, ABOUT + (number % 2) as usize * 16);
        let Meeting { kind, width, bytes, step, .. } = *meeting;
        self.word64(about).store(what(kind, width, step), Ordering::Relaxed);
        self.word64(about + 8).store(bytes, Ordering::Relaxed);
        self.word(self.post_at(rank, meeting.group, NUMBER)).store(number, Ordering::SeqCst);
    }

    /// Wakes a rank to look again.
    pub(super) fn ring(&self, rank: usize) {
        let bell = self.word(self.block(rank, block::BELL));
        bell.fetch_add(1, Ordering::SeqCst);
        // Whoever sleeps after this look has seen the bell's new number before.
        if self.word(self.block(rank, block::SLEEPS)).load(Ordering::SeqCst) != 0 {
            // It fails for no reason that this process could help.
            let _ = futex::wake(bell, futex::Flags::empty(), u32::MAX >> 1);
        }
    }

    /// Waits until `other` has posted `number`, and holds it to the same meeting.
    pub(super) fn wait(
        &self,
        (rank, other): (usize, usize),
        meeting: &Meeting,
        number: u32,
        timeout: Duration,
    ) -> Result<(), CollectiveError> {
        if !self.is_there(other, meeting.group, number)? {
            self.note_wait(rank, other, meeting, number);
            let slept = self.sleep((rank, other), meeting.group, number, timeout);
            self.word(self.wait_at(rank, FOR)).store(0, Ordering::SeqCst);
            slept?;
        }
        self.same(rank, other, meeting, number)
    }

    fn sleep(
        &self,
        (rank, other): (usize, usize),
        group: usize,
        number: u32,
        timeout: Duration,
    ) -> Result<(), CollectiveError> {
        let began = Instant::now();
        let (bell, sleeps) =
            (self.word(self.block(rank, block::BELL)), self.word(self.block(rank, block::SLEEPS)));
        sleeps.store(1, Ordering::SeqCst);
        let result = loop {
            let rung = bell.load(Ordering::SeqCst);
            match self.is_there(other, group, number) {
                Ok(false) => {}
                Ok(true) => break Ok(()),
                Err(error) => break Err(error),
            }
            let waited = began.elapsed();
            // Posts come before leaving.
            if self.is(other, Presence::Left) && !reached(self.posted(other, group), number) {
                break Err(self.give_up(rank, other, LEFT, waited));
            }
            let Some(rest) = timeout.checked_sub(waited).filter(|rest| !rest.is_zero()) else {
                break Err(self.give_up(rank, other, LATE, waited));
            };
            let rest = futex::Timespec {
                tv_sec: rest.as_secs() as i64,
                tv_nsec: i64::from(rest.subsec_nanos()),
            };
            // Whatever ends it, the loop looks again.
            let _ = futex::wait(bell, futex::Flags::empty(), rung, Some(&rest));
        };
        sleeps.store(0, Ordering::SeqCst);
        result
    }

    /// Whether a post is there; an error where it is not and all were stopped. What everybody came to before
    /// ends well.
    fn is_there(&self, other: usize, group: usize, number: u32) -> Result<bool, CollectiveError> {
        if reached(self.posted(other, group), number) {
            return Ok(true);
        }
        self.stopped().map_or(Ok(false), Err)
    }

    fn note_wait(&self, rank: usize, other: usize, meeting: &Meeting, number: u32) {
        let Meeting { group, name, kind, width, bytes, step } = *meeting;
        self.word(self.wait_at(rank, GROUP)).store(group as u32, Ordering::Relaxed);
        self.word(self.wait_at(rank, AWAITED)).store(number, Ordering::Relaxed);
        self.word64(self.wait_at(rank, WHAT)).store(what(kind, width, step), Ordering::Relaxed);
        self.word64(self.wait_at(rank, BYTES)).store(bytes, Ordering::Relaxed);
        self.word64(self.wait_at(rank, CALLED)).store(packed(name), Ordering::Relaxed);
        self.word(self.wait_at(rank, FOR)).store(other as u32 + 1, Ordering::SeqCst);
    }

    /// Whom a rank waits for who has not come.
    fn awaited_by(&self, rank: usize) -> Option<usize> {
        let other = self.word(self.wait_at(rank, FOR)).load(Ordering::SeqCst).checked_sub(1)?;
        let group = self.word(self.wait_at(rank, GROUP)).load(Ordering::Relaxed) as usize;
        let number = self.word(self.wait_at(rank, AWAITED)).load(Ordering::Relaxed);
        let other = other as usize;
        let sound = other < self.world() && group < super::GROUPS;
        (sound && !reached(self.posted(other, group), number)).then_some(other)
    }

    /// Stops all because `rank` waited for `other` in vain: the one to name is whoever is at the end of the
    /// chain of those who wait.
    fn give_up(&self, rank: usize, other: usize, cause: u32, waited: Duration) -> CollectiveError {
        let (mut waiting, mut missing) = (rank, other);
        for _ in 0..self.world() {
            let Some(next) = self.awaited_by(missing) else { break };
            (waiting, missing) = (missing, next);
        }
        let cause = if self.is(missing, Presence::Left) { LEFT } else { cause };
        self.stop(|stop| {
            let wide =
                |from: usize| self.word64(self.wait_at(waiting, from)).load(Ordering::Relaxed);
            self.word(stop + CAUSE).store(cause, Ordering::Relaxed);
            self.word(stop + MISSING).store(missing as u32, Ordering::Relaxed);
            self.word(stop + WAITING).store(waiting as u32, Ordering::Relaxed);
            self.word64(stop + STOP_WHAT).store(wide(WHAT), Ordering::Relaxed);
            self.word64(stop + STOP_BYTES).store(wide(BYTES), Ordering::Relaxed);
            self.word64(stop + STOP_CALLED).store(wide(CALLED), Ordering::Relaxed);
            self.word64(stop + WAITED).store(waited.as_nanos() as u64, Ordering::Relaxed);
        })
    }

    /// Holds a post of another rank to what this one does.
    fn same(
        &self,
        rank: usize,
        other: usize,
        meeting: &Meeting,
        number: u32,
    ) -> Result<(), CollectiveError> {
        let about = self.post_at(other, meeting.group, ABOUT + (number % 2) as usize * 16);
        let there = self.word64(about).load(Ordering::Relaxed);
        let bytes = self.word64(about + 8).load(Ordering::Relaxed);
        let Meeting { kind, width, step, name, .. } = *meeting;
        let here = what(kind, width, step);
        if (there, bytes) == (here, meeting.bytes) {
            return Ok(());
        }
        let told = |what: u64, bytes: u64| {
            let (step, width) = (what & STEP, (what >> 48) & 0xff);
            format!("{} over {name}, {bytes} bytes in elements of {width}, step {step}", op(what))
        };
        let (here, there) = (told(here, meeting.bytes), told(there, bytes));
        let error = CollectiveError::Differs { rank, here, other, there };
        self.abort(&error.to_string());
        Err(error)
    }

    /// Stops all ranks, unless somebody did.
    pub(super) fn abort(&self, reason: &str) {
        let mut end = reason.len().min(MAX_TEXT);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        let reason = &reason.as_bytes()[..end];
        self.stop(|stop| {
            self.word(stop + CAUSE).store(SAID, Ordering::Relaxed);
            self.word(stop + TEXT_LEN).store(reason.len() as u32, Ordering::Relaxed);
            for (at, bytes) in reason.chunks(4).enumerate() {
                let mut word = [0; 4];
                word[..bytes.len()].copy_from_slice(bytes);
                let word = u32::from_le_bytes(word);
                self.word(stop + TEXT + at * 4).store(word, Ordering::Relaxed);
            }
        });
    }

    /// Writes the cause of a stop if there is none, and wakes everybody. Returns the cause that stays.
    fn stop(&self, write: impl FnOnce(usize)) -> CollectiveError {
        let state = self.word(header::STOP + STATE);
        if state.compare_exchange(NONE, WRITING, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            write(header::STOP);
            state.store(TOLD, Ordering::SeqCst);
            (0..self.world()).for_each(|rank| self.ring(rank));
        }
        let untold = || CollectiveError::Aborted { reason: "nobody said why".to_owned() };
        self.stopped().unwrap_or_else(untold)
    }

    /// Why all were stopped.
    pub(super) fn stopped(&self) -> Option<CollectiveError> {
        let (stop, state) = (header::STOP, self.word(header::STOP + STATE));
        if state.load(Ordering::SeqCst) == NONE {
            return None;
        }
        let began = Instant::now();
        while state.load(Ordering::SeqCst) != TOLD && began.elapsed() < TELLING {
            std::thread::yield_now();
        }
        let narrow = |at: usize| self.word(stop + at).load(Ordering::Relaxed);
        let wide = |at: usize| self.word64(stop + at).load(Ordering::Relaxed);
        let cause = narrow(CAUSE);
        if cause == LATE || cause == LEFT {
            return Some(CollectiveError::Missing {
                missing: narrow(MISSING) as usize,
                left: cause == LEFT,
                waiting: narrow(WAITING) as usize,
                op: op(wide(STOP_WHAT)),
                group: unpacked(wide(STOP_CALLED)),
                bytes: wide(STOP_BYTES),
                step: wide(STOP_WHAT) & STEP,
                waited: Duration::from_nanos(wide(WAITED)),
            });
        }
        let len = (narrow(TEXT_LEN) as usize).min(MAX_TEXT);
        let words = (0..len.div_ceil(4)).flat_map(|at| narrow(TEXT + at * 4).to_le_bytes());
        let text: Vec<u8> = words.take(len).collect();
        Some(CollectiveError::Aborted { reason: String::from_utf8_lossy(&text).into_owned() })
    }
}
