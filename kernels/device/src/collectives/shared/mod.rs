//! Collectives of processes of one machine, through a file that all of them map.
//!
//! A rank copies what it gives into its own stage, posts a number, and reads the stages of the others once
//! they posted theirs; it sleeps until then. An all-reduce is a reduce-scatter and a gather, so a rank reads
//! from others exactly what a ring would bring it. What is longer than a stage goes in pieces. Each group
//! has two stages in turn: whoever posted the next number has read the last one, and nobody writes the one
//! before it until all have posted. Invariant: a stage is read only between its owner's post and this
//! rank's next one.

mod meet;
mod region;
mod stage;

pub use region::{SharedRegion, Stopper};

use super::{
    CollectiveError, Collectives, ElementsMut, GROUPS, Group, Kind, Moved, RegionError, Transfer,
};
use core::ops::Range;
use half::bf16;
use meet::Meeting;
use region::Map;
use stage::{Element, Stage};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Bytes of a stage that suit steps of a few hundred tokens; longer operations go in pieces.
pub const DEFAULT_STAGE: usize = 256 << 10;
/// How long a rank waits for others inside one operation.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// One rank's end.
#[derive(Debug)]
pub struct SharedMemory {
    map: Arc<Map>,
    rank: usize,
    step: u64,
    timeout: Duration,
    /// The last number posted in each group.
    posted: [u32; GROUPS],
    /// Sums of elements that are not singles.
    sums: Vec<f32>,
}

impl SharedMemory {
    /// Takes the place of `rank` in the file at `path`, which [`SharedRegion::create`] made. `timeout` is
    /// the longest wait for another rank inside an operation.
    ///
    /// # Errors
    /// When the file is another, or the rank is not among those it was made for, or joined before.
    pub fn join(path: &Path, rank: usize, timeout: Duration) -> Result<Self, RegionError> {
        let map = Map::open(path)?;
        map.join(rank, path)?;
        let sums = vec![0.0; map.stage() / size_of::<bf16>()];
        Ok(Self { map: Arc::new(map), rank, step: 0, timeout, posted: [0; GROUPS], sums })
    }

    /// What other threads of this process stop the ranks by.
    #[must_use]
    pub fn stopper(&self) -> Stopper {
        Stopper::new(Arc::clone(&self.map))
    }

    /// What every rank of a group comes to now; an error once all were stopped.
    fn meeting<T: Element>(
        &self,
        group: &Group,
        kind: Kind,
        bytes: usize,
    ) -> Result<Meeting, CollectiveError> {
        if let Some(cause) = self.map.stopped() {
            return Err(cause);
        }
        Ok(Meeting {
            group: group.number,
            name: group.name,
            kind,
            width: size_of::<T>(),
            bytes: bytes as u64,
            step: self.step,
        })
    }

    /// Offers what `fill` writes into this rank's next stage, and wakes who waits for it. Returns its number.
    fn post(&mut self, group: &Group, meeting: &Meeting, fill: impl FnOnce(&Stage)) -> u32 {
        let number = self.posted[group.number].wrapping_add(1);
        self.posted[group.number] = number;
        fill(&self.map.stage_of(self.rank, group.number, number));
        self.map.post(self.rank, meeting, number);
        for member in group.members.iter().filter(|member| **member != self.rank) {
            self.map.ring(*member);
        }
        number
    }

    /// The stage of a member that posted `number`.
    fn stage_of(
        &self,
        group: &Group,
        member: usize,
        meeting: &Meeting,
        number: u32,
    ) -> Result<Stage, CollectiveError> {
        if member != self.rank {
            self.map.wait((self.rank, member), meeting, number, self.timeout)?;
        }
        Ok(self.map.stage_of(member, group.number, number))
    }

    /// `out` becomes the sum of what all members have from element `at` of their stages on.
    fn sum<T: Element>(
        &mut self,
        group: &Group,
        meeting: &Meeting,
        number: u32,
        at: usize,
        out: &mut [T],
    ) -> Result<(), CollectiveError> {
        // All have to come, also where this one has nothing to sum: their next stage is free then.
        for member in &group.members {
            self.stage_of(group, *member, meeting, number)?;
        }
        let stages =
            group.members.iter().map(|member| self.map.stage_of(*member, group.number, number));
        T::sum(stages, at, out, &mut self.sums);
        Ok(())
    }

    fn reduce<T: Element>(&mut self, group: &Group, x: &mut [T]) -> Moved {
        let members = group.members.len();
        if members == 1 {
            return Ok(0);
        }
        let meeting = self.meeting::<T>(group, Kind::AllReduce, size_of_val(x))?;
        let mut read = 0;
        for piece in x.chunks_mut(self.map.stage() / size_of::<T>()) {
            let number = self.post(group, &meeting, |stage| stage.write(0, piece));
            let own = part(piece.len(), members, group.position);
            self.sum(group, &meeting, number, own.start, &mut piece[own.clone()])?;
            read += own.len() * (members - 1);
            let number = self.post(group, &meeting, |stage| stage.write(0, &piece[own]));
            for (position, member) in group.members.iter().enumerate() {
                if position != group.position {
                    let theirs = part(piece.len(), members, position);
                    read += theirs.len();
                    self.stage_of(group, *member, &meeting, number)?.read(0, &mut piece[theirs]);
                }
            }
        }
        Ok((read * size_of::<T>()) as u64)
    }

    fn gather<T: Element>(&mut self, group: &Group, x: &[T], run: usize, out: &mut [T]) -> Moved {
        let members = group.members.len();
        fit(Kind::AllGather, out.len(), x.len() * members)?;
        if x.is_empty() {
            return Ok(0);
        }
        fit(Kind::AllGather, x.len(), x.len() / run.max(1) * run)?;
        let meeting = self.meeting::<T>(group, Kind::AllGather, size_of_val(out))?;
        let most = self.map.stage() / size_of::<T>();
        for start in (0..x.len()).step_by(most) {
            let piece = start..(start + most).min(x.len());
            let number = self.post(group, &meeting, |stage| stage.write(0, &x[piece.clone()]));
            for (position, member) in group.members.iter().enumerate() {
                let stage = self.stage_of(group, *member, &meeting, number)?;
                let mut from = piece.start;
                while from < piece.end {
                    let (row, column) = (from / run, from % run);
                    let len = (run - column).min(piece.end - from);
                    let to = (row * members + position) * run + column;
                    stage.read(from - piece.start, &mut out[to..to + len]);
                    from += len;
                }
            }
        }
        Ok((size_of_val(x) * (members - 1)) as u64)
    }

    fn scatter<T: Element>(&mut self, group: &Group, x: &[T], out: &mut [T]) -> Moved {
        let (members, len) = (group.members.len(), out.len());
        fit(Kind::ReduceScatter, x.len(), len * members)?;
        let meeting = self.meeting::<T>(group, Kind::ReduceScatter, size_of_val(x))?;
        let most = self.map.stage() / size_of::<T>() / members;
        for start in (0..len).step_by(most) {
            let piece = start..(start + most).min(len);
            let number = self.post(group, &meeting, |stage| {
                for (position, part) in x.chunks_exact(len).enumerate() {
                    stage.write(position * piece.len(), &part[piece.clone()]);
                }
            });
            let at = group.position * piece.len();
            self.sum(group, &meeting, number, at, &mut out[piece])?;
        }
        Ok((size_of_val(out) * (members - 1)) as u64)
    }
}

impl Collectives for SharedMemory {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.map.world()
    }

    fn begin_step(&mut self, step: u64) {
        self.step = step;
    }

    fn all_reduce(&mut self, group: &Group, x: ElementsMut<'_>) -> Moved {
        match x {
            ElementsMut::F32(x) => self.reduce(group, x),
            ElementsMut::Bf16(x) => self.reduce(group, x),
        }
    }

    fn all_gather(&mut self, group: &Group, parts: Transfer<'_>, run: usize) -> Moved {
        match parts {
            Transfer::F32 { x, out } => self.gather(group, x, run, out),
            Transfer::Bf16 { x, out } => self.gather(group, x, run, out),
        }
    }

    fn reduce_scatter(&mut self, group: &Group, parts: Transfer<'_>) -> Moved {
        match parts {
            Transfer::F32 { x, out } => self.scatter(group, x, out),
            Transfer::Bf16 { x, out } => self.scatter(group, x, out),
        }
    }
}

impl Drop for SharedMemory {
    /// Nobody waits for a rank that ended.
    fn drop(&mut self) {
        self.map.leave(self.rank);
    }
}

/// The elements of `len` that one of so many members sums; the last ones may have less.
fn part(len: usize, members: usize, position: usize) -> Range<usize> {
    let each = len.div_ceil(members);
    (position * each).min(len)..((position + 1) * each).min(len)
}

fn fit(kind: Kind, got: usize, wanted: usize) -> Result<(), CollectiveError> {
    if got == wanted {
        return Ok(());
    }
    Err(CollectiveError::Elements { op: kind.name(), got, wanted })
}

#[cfg(test)]
mod tests;
