//! The file that ranks map: its layout, who joined, and the handles that others stop the ranks by.
//!
//! ```text
//! header 512 | a block of 512 bytes for each rank | from the next page on: stages [rank][group][2]
//! ```
//! It holds numbers and no addresses, because every process maps it elsewhere. Invariant: nothing in the
//! file is used before its size and its first words were held to the layout.

use super::super::{CollectiveError, GROUPS, RegionError};
use super::stage::Stage;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, fallocate};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Says what the file is, and its version.
const MAGIC: u64 = u64::from_le_bytes(*b"tkmranks") ^ 1;
const HEADER: usize = 512;
const BLOCK: usize = 512;
const PAGE: usize = 4096;
/// The most ranks of a file.
const MAX_WORLD: usize = 256;
/// A stage has an element for every member at least, and begins on a page.
const MIN_STAGE: usize = PAGE;

/// Words of the header.
pub(super) mod header {
    pub(in super::super) const MAGIC: usize = 0;
    pub(in super::super) const WORLD: usize = 8;
    pub(in super::super) const STAGE: usize = 16;
    /// Why all were stopped; see `meet`.
    pub(in super::super) const STOP: usize = 64;
}

/// Words of a rank's block.
pub(super) mod block {
    /// [`super::Presence`].
    pub(in super::super) const PRESENT: usize = 0;
    /// Changes with everything that this rank may wait for.
    pub(in super::super) const BELL: usize = 64;
    /// Whether somebody has to be woken when the bell rings.
    pub(in super::super) const SLEEPS: usize = 68;
    /// What it waits for; see `meet`.
    pub(in super::super) const WAIT: usize = 128;
    /// Posts of each group, 64 bytes apart; see `meet`.
    pub(in super::super) const POSTS: usize = 192;
}

/// Whether a rank is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Presence {
    /// It has not come yet.
    Awaited = 0,
    /// It takes part.
    Joined = 1,
    /// It will not come any more.
    Left = 2,
}

/// The mapped file.
#[derive(Debug)]
pub(super) struct Map {
    raw: MmapRaw,
    world: usize,
    stage: usize,
}

impl Map {
    /// Maps a file that [`SharedRegion::create`] made.
    pub(super) fn open(path: &Path) -> Result<Self, RegionError> {
        let io = |source| RegionError::Io { path: path.to_owned(), bytes: 0, source };
        let foreign = || RegionError::Foreign { path: path.to_owned() };
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(io)?;
        let raw = MmapOptions::new().map_raw(&file).map_err(io)?;
        if raw.len() < HEADER {
            return Err(foreign());
        }
        let mut map = Self { raw, world: 0, stage: 0 };
        let wide = |at| map.word64(at).load(Ordering::Acquire);
        let (magic, world, stage) = (wide(header::MAGIC), wide(header::WORLD), wide(header::STAGE));
        let (world, stage) = (world as usize, stage as usize);
        let fits = limits(world, stage).is_ok() && map.raw.len() == len(world, stage);
        if magic != MAGIC || !fits {
            return Err(foreign());
        }
        (map.world, map.stage) = (world, stage);
        Ok(map)
    }

    /// Ranks.
    pub(super) const fn world(&self) -> usize {
        self.world
    }

    /// Bytes of a stage.
    pub(super) const fn stage(&self) -> usize {
        self.stage
    }

    /// Takes a rank's place.
    pub(super) fn join(&self, rank: usize, path: &Path) -> Result<(), RegionError> {
        if rank >= self.world {
            let allowed = format!("below {}", self.world);
            return Err(RegionError::Limit { what: "rank", got: rank, allowed });
        }
        let place = self.word(self.block(rank, block::PRESENT));
        let (awaited, joined) = (Presence::Awaited as u32, Presence::Joined as u32);
        match place.compare_exchange(awaited, joined, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => Ok(()),
            Err(_) => Err(RegionError::Taken { rank, path: path.to_owned() }),
        }
    }

    /// Says that a rank will not come any more.
    pub(super) fn leave(&self, rank: usize) {
        self.word(self.block(rank, block::PRESENT)).store(Presence::Left as u32, Ordering::SeqCst);
        (0..self.world).for_each(|other| self.ring(other));
    }

    pub(super) fn is(&self, rank: usize, presence: Presence) -> bool {
        self.word(self.block(rank, block::PRESENT)).load(Ordering::SeqCst) == presence as u32
    }

    /// Where a word of a rank's block lies.
    pub(super) const fn block(&self, rank: usize, word: usize) -> usize {
        HEADER + rank * BLOCK + word
    }

    /// A word of the header or of a block.
    pub(super) fn word(&self, at: usize) -> &AtomicU32 {
        assert!(at.is_multiple_of(4) && at + 4 <= self.raw.len(), "a word at {at}");
        // SAFETY: the word lies inside of the map, which begins on a page, so it is aligned; the map lives as
        // long as `self`; control words are atomics in every process and lie in front of all stages.
        unsafe { AtomicU32::from_ptr(self.raw.as_mut_ptr().add(at).cast()) }
    }

    /// A wide word, likewise.
    pub(super) fn word64(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8) && at + 8 <= self.raw.len(), "a word at {at}");
        // SAFETY: as for `word`.
        unsafe { AtomicU64::from_ptr(self.raw.as_mut_ptr().add(at).cast()) }
    }

    /// The stage that a rank offers in a group under `number`: two in turn.
    pub(super) fn stage_of(&self, rank: usize, group: usize, number: u32) -> Stage {
        let index = (rank * GROUPS + group) * 2 + (number % 2) as usize;
        let at = stages(self.world) + index * self.stage;
        assert!(rank < self.world && at + self.stage <= self.raw.len(), "stage {index}");
        // SAFETY: inside of the map, which its `Arc` keeps while the rank's end exists; on a page; turns are
        // the protocol's, see the module's head.
        unsafe { Stage::new(self.raw.as_mut_ptr().add(at), self.stage) }
    }
}

/// Where stages begin.
const fn stages(world: usize) -> usize {
    (HEADER + world * BLOCK).next_multiple_of(PAGE)
}

/// Bytes of the file.
const fn len(world: usize, stage: usize) -> usize {
    stages(world) + world * GROUPS * 2 * stage
}

fn limits(world: usize, stage: usize) -> Result<(), RegionError> {
    let limit = |what, got, allowed| Err(RegionError::Limit { what, got, allowed });
    if !(1..=MAX_WORLD).contains(&world) {
        return limit("world", world, format!("1 to {MAX_WORLD}"));
    }
    if !(MIN_STAGE..=1 << 30).contains(&stage) || !stage.is_multiple_of(PAGE) {
        return limit("stage", stage, format!("a multiple of {PAGE} up to {}", 1 << 30));
    }
    Ok(())
}

/// The supervisor's handle on the file, which goes with it.
#[derive(Debug)]
pub struct SharedRegion {
    path: PathBuf,
    map: Arc<Map>,
}

impl SharedRegion {
    /// Makes the file for `world` ranks with stages of `stage` bytes, and takes its memory, of
    /// `6 * world * stage` bytes and a little more. It belongs on a file system in memory.
    ///
    /// # Errors
    /// When there is a file already, no room, or a number is out of range.
    pub fn create(path: &Path, world: usize, stage: usize) -> Result<Self, RegionError> {
        limits(world, stage)?;
        let bytes = len(world, stage) as u64;
        let io = |source| RegionError::Io { path: path.to_owned(), bytes, source };
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(path).map_err(io)?;
        match prepare(&file, bytes, world, stage).and_then(|()| MmapOptions::new().map_raw(&file)) {
            Ok(raw) => Ok(Self { path: path.to_owned(), map: Arc::new(Map { raw, world, stage }) }),
            Err(source) => {
                let _ = std::fs::remove_file(path);
                Err(io(source))
            }
        }
    }

    /// Where it lies.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Stops all ranks: who waits and who comes later hears `reason`. The first reason stays.
    pub fn abort(&self, reason: &str) {
        self.map.abort(reason);
    }

    /// Why the ranks were stopped, if they were.
    #[must_use]
    pub fn stopped(&self) -> Option<CollectiveError> {
        self.map.stopped()
    }

    /// Ranks that joined, gone ones included.
    #[must_use]
    pub fn joined(&self) -> Vec<usize> {
        (0..self.map.world).filter(|rank| !self.map.is(*rank, Presence::Awaited)).collect()
    }

    /// A handle for other threads.
    #[must_use]
    pub fn stopper(&self) -> Stopper {
        Stopper::new(Arc::clone(&self.map))
    }
}

impl Drop for SharedRegion {
    fn drop(&mut self) {
        // Ranks have it mapped; the name is of no use to anyone any more.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Gives a new file its size, its memory and its first words.
fn prepare(file: &File, bytes: u64, world: usize, stage: usize) -> io::Result<()> {
    match fallocate(file, FallocateFlags::empty(), 0, bytes) {
        Ok(()) => {}
        // Some file systems only take memory when it is used.
        Err(rustix::io::Errno::OPNOTSUPP) => file.set_len(bytes)?,
        Err(errno) => return Err(errno.into()),
    }
    let raw = MmapOptions::new().map_raw(file)?;
    let map = Map { raw, world, stage };
    map.word64(header::WORLD).store(world as u64, Ordering::Relaxed);
    map.word64(header::STAGE).store(stage as u64, Ordering::Relaxed);
    map.word64(header::MAGIC).store(MAGIC, Ordering::Release);
    Ok(())
}

/// Stops all ranks from any thread of any process that has the file.
#[derive(Clone, Debug)]
pub struct Stopper {
    map: Arc<Map>,
}

impl Stopper {
    pub(super) const fn new(map: Arc<Map>) -> Self {
        Self { map }
    }

    /// As [`SharedRegion::abort`].
    pub fn abort(&self, reason: &str) {
        self.map.abort(reason);
    }
}
