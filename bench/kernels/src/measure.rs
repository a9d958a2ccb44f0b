//! Running a case: the check, then launches in a graph, held against the device's ceilings.

use crate::case::{Case, Launch, Work};
use crate::near::Failure;
use crate::peer;
use crate::rig::Rig;
use device::cuda::DeviceFacts;
use ops::cuda::{Dtype, Queue, Rows, Tensor};
use ops::linear::cuda::{Linear, linear, statement};
use ops::paged::cuda::copy_blocks;
use ops::read::cuda::read;

/// Rounds of which the median counts.
const ROUNDS: usize = 7;
/// A round takes so many microseconds at least, in launches of one graph.
const LEAST_ROUND: f64 = 400.0;
/// Launches of a graph.
const LEAST_LAUNCHES: usize = 2;
const MOST_LAUNCHES: usize = 1024;
/// Bytes of a set of the read and the copy.
const STREAMED: usize = 2 << 30;
/// Sizes of the products of which the fastest is a ceiling: rows, inputs, outputs.
const PRODUCTS: [(usize, usize, usize); 3] =
    [(8192, 8192, 8192), (4096, 4096, 12_288), (2048, 4096, 6144)];
/// Bytes of a block of the copy by our own kernel.
const COPIED: usize = 1 << 20;

/// What the device gives at best, measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ceilings {
    /// Bytes a second of a copy, both directions counted.
    pub copy: f64,
    /// Bytes a second of a read.
    pub read: f64,
    /// Operations a second of a product of bf16 matrices.
    pub product: f64,
}

/// What a launch achieved of what bounds it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rate {
    /// Bytes a second.
    Bytes(f64),
    /// Operations a second.
    Flops(f64),
}

/// What was measured of a case.
#[derive(Clone, Debug, PartialEq)]
pub struct Figure {
    /// The case.
    pub name: String,
    /// Microseconds of one launch: the median of rounds, each the mean of a graph of launches.
    pub micros: f64,
    /// Of the fastest and the slowest round.
    pub range: [f64; 2],
    /// Microseconds that its bytes or operations take at the ceiling, whichever are more; none where
    /// operands stay in the cache.
    pub floor: Option<f64>,
    /// What it achieved of that.
    pub rate: Rate,
    /// What another implementation takes, in microseconds, measured apart.
    pub peer: Option<f64>,
}

/// A device, its kernels and its ceilings.
pub struct Bench {
    rig: Rig,
    ceilings: Ceilings,
}

impl std::fmt::Debug for Bench {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bench").field("ceilings", &self.ceilings).finish_non_exhaustive()
    }
}

impl Bench {
    /// Opens the first device and measures its ceilings.
    ///
    /// # Errors
    /// Without a device or kernels for it ([`Failure::is_absent`]), or when either fails.
    pub fn open() -> Result<Self, Failure> {
        let mut rig = Rig::open()?;
        let ceilings = ceilings(&mut rig)?;
        Ok(Self { rig, ceilings })
    }

    /// What the device is.
    #[must_use]
    pub fn device(&self) -> &DeviceFacts {
        self.rig.context().facts()
    }

    /// Which kernels products run on, for people.
    #[must_use]
    pub fn products(&self) -> String {
        statement(&self.rig.gpu)
    }

    /// What it gives at best.
    #[must_use]
    pub const fn ceilings(&self) -> Ceilings {
        self.ceilings
    }

    /// Checks a case.
    ///
    /// # Errors
    /// When its results are wrong, or the device fails.
    pub fn check(&mut self, case: &Case) -> Result<(), Failure> {
        self.rig.clear();
        let ready = case.setup(&mut self.rig)?;
        (ready.check)(&self.rig, &ready.launch)
    }

    /// Checks a case and times it.
    ///
    /// # Errors
    /// As [`Bench::check`].
    pub fn run(&mut self, case: &Case) -> Result<Figure, Failure> {
        self.rig.clear();
        let ready = case.setup(&mut self.rig)?;
        (ready.check)(&self.rig, &ready.launch)?;
        let times = time(&self.rig, ready.sets, &ready.launch)?;
        let micros = times[ROUNDS / 2];
        let (floor, rate) = self.ceilings.of(&ready.work, micros);
        Ok(Figure {
            name: case.name().to_owned(),
            micros,
            range: [times[0], times[ROUNDS - 1]],
            floor,
            rate,
            peer: peer::micros(case.name()),
        })
    }
}

impl Ceilings {
    /// The floor of some work in microseconds, and what is achieved of what bounds it.
    fn of(&self, work: &Work, micros: f64) -> (Option<f64>, Rate) {
        let moved = (work.bytes / self.read).max(work.copied / self.copy);
        let product = work.flops / self.product;
        let floor = 1e6 * moved.max(product);
        let each = |amount: f64| 1e6 * amount / micros;
        let rate = match product > moved {
            true => Rate::Flops(each(work.flops)),
            false => Rate::Bytes(each(work.bytes.max(work.copied))),
        };
        ((!work.cached).then_some(floor), rate)
    }
}

/// Microseconds of one launch in each round, sorted.
fn time(rig: &Rig, sets: usize, launch: &Launch) -> Result<[f64; ROUNDS], Failure> {
    // The first runs load code; the second says how many make a round.
    rig.run(launch, 0)?;
    let once = rig.timed(|| launch(rig.queue(), 1 % sets))?;
    let wanted = (LEAST_ROUND / once.max(0.1)).ceil() as usize;
    let launches = wanted.max(sets).clamp(LEAST_LAUNCHES, MOST_LAUNCHES);
    let graph = rig.stream.capture(|stream| {
        let on = Queue { gpu: &rig.gpu, stream };
        (0..launches).try_for_each(|i| launch(on, i % sets))
    })?;
    let mut times = [0.0; ROUNDS];
    for time in &mut times {
        // A launch in front keeps the device busy while the host enqueues what is timed: steps are enqueued
        // ahead, and the host's way to an idle device is no part of a kernel.
        graph.launch(&rig.stream)?;
        *time = rig.timed(|| graph.launch(&rig.stream))? / launches as f64;
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}

fn ceilings(rig: &mut Rig) -> Result<Ceilings, Failure> {
    let all = rig.normal(STREAMED, 1.0)?;
    let halves = [all.slice(0..STREAMED), all.slice(STREAMED..2 * STREAMED)];
    let best = |rig: &Rig, launch: Launch| Ok::<_, Failure>(time(rig, 2, &launch)?[0]);
    let (out, from) = (rig.space(4)?, halves.clone());
    let read = best(rig, Box::new(move |on, i| read(on, &from[i], &out)))?;
    // The driver's copy or ours, whichever is faster.
    let by_driver = best(rig, Box::new(move |on, i| on.stream.copy(&halves[i], &halves[1 - i])))?;
    let blocks = STREAMED / COPIED;
    let offsets = |first: usize| -> Vec<u64> {
        (first..first + blocks).map(|block| (block * COPIED / 2) as u64).collect()
    };
    let offsets = [rig.u64s(&offsets(0))?, rig.u64s(&offsets(blocks))?];
    let launch: Launch = Box::new(move |on, i| {
        let (arena, rows) = (Tensor::new(&all, Dtype::Bf16), Rows::exactly(blocks));
        copy_blocks(on, rows, arena, COPIED, &offsets[i], &offsets[1 - i])
    });
    let copy = best(rig, launch)?.min(by_driver);
    let mut product = 0.0_f64;
    for (rows, inputs, outputs) in PRODUCTS {
        rig.clear();
        let x = rig.normal(rows * inputs, 1.0)?;
        let w = [rig.normal(inputs * outputs, 0.02)?, rig.normal(inputs * outputs, 0.02)?];
        let out = rig.space(rows * outputs * 2)?;
        let launch: Launch = Box::new(move |on, i| {
            let [x, out] = [&x, &out].map(|slice| Tensor::new(slice, Dtype::Bf16));
            linear(on, Rows::exactly(rows), &Linear::plain(x, &w[i], out, inputs, outputs))
        });
        let operations = 2.0 * rows as f64 * inputs as f64 * outputs as f64;
        product = product.max(1e6 * operations / best(rig, launch)?);
    }
    rig.clear();
    let streamed = 1e6 * STREAMED as f64;
    Ok(Ceilings { copy: 2.0 * streamed / copy, read: streamed / read, product })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_floor_is_of_what_bounds_the_work() {
        let ceilings = Ceilings { copy: 4e12, read: 4e12, product: 800e12 };
        let near = |floor: Option<f64>, to: f64| floor.is_some_and(|f| (f - to).abs() < 1e-9);
        let (floor, rate) = ceilings.of(&Work::bytes(4_000_000), 2.0);
        assert!(near(floor, 1.0));
        assert_eq!(rate, Rate::Bytes(2e12));
        let (floor, rate) = ceilings.of(&Work::bytes(4_000).and_flops(1.6e9), 4.0);
        assert!(near(floor, 2.0));
        assert_eq!(rate, Rate::Flops(400e12));
        let (floor, rate) = ceilings.of(&Work::cached(4_000_000), 1.0);
        assert_eq!((floor, rate), (None, Rate::Bytes(4e12)));
    }
}
