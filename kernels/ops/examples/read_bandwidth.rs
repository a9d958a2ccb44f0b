//! Measures what the memory gives to reading threads, the ceiling of decoding on a CPU:
//!
//! ```text
//! cargo run --release -p ops --example read_bandwidth -- [threads] [GiB]
//! ```
//!
//! Every thread sums its share of a buffer far larger than the caches. Prints one JSON object, the
//! median of five passes.

#![allow(clippy::print_stdout, reason = "the figure is what this program is for")]

use std::time::Instant;

/// Passes of which the median is taken.
const ROUNDS: usize = 5;
/// Independent sums of a thread, so that no addition waits for another.
const LANES: usize = 64;

fn sum(words: &[u64]) -> u64 {
    let mut lanes = [0_u64; LANES];
    let chunks = words.chunks_exact(LANES);
    let rest: u64 = chunks.remainder().iter().sum();
    for chunk in chunks {
        for (lane, word) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*word);
        }
    }
    lanes.iter().fold(rest, |sum, lane| sum.wrapping_add(*lane))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let cores = std::thread::available_parallelism()?.get();
    let threads: usize = args.next().map_or(Ok(cores), |text| text.parse())?;
    let gib: usize = args.next().map_or(Ok(4), |text| text.parse())?;
    // Written, not only zeroed: untouched pages would all be one page of zeros.
    let buffer: Vec<u64> = (0..(gib << 30) / 8).map(|i| i as u64).collect();
    let mut rates = [0.0; ROUNDS];
    for rate in &mut rates {
        let begin = Instant::now();
        std::thread::scope(|scope| {
            for share in buffer.chunks(buffer.len().div_ceil(threads.max(1))) {
                scope.spawn(move || std::hint::black_box(sum(share)));
            }
        });
        *rate = (buffer.len() * 8) as f64 / begin.elapsed().as_secs_f64() / 1e9;
    }
    rates.sort_by(f64::total_cmp);
    println!(
        "{{\"bench\":\"read_bandwidth\",\"threads\":{threads},\"gib\":{gib},\"gb_per_s\":{:.2}}}",
        rates[ROUNDS / 2]
    );
    Ok(())
}
