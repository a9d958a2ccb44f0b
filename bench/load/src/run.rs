//! Drives many streams: a fixed number in flight, or arrivals at a rate.

use crate::{Client, ClientError, Report, StreamEnd, Timeline};
use futures::stream::{FuturesUnordered, StreamExt};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What to send.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Requests in all.
    pub requests: u32,
    /// Requests in flight at once.
    pub concurrency: u32,
    /// Arrivals per second, exponential gaps; as fast as `concurrency` allows when absent.
    pub rate: Option<f64>,
    /// The prompts.
    pub prompts: Prompts,
    /// Tokens generated per request.
    pub output: u32,
}

/// Random prompts of one length. Prompt `i` depends on the seed and `i` alone.
#[derive(Clone, Copy, Debug)]
pub struct Prompts {
    /// Tokens of each.
    pub length: u32,
    /// Token ids are drawn below this.
    pub vocab: u32,
    /// Seed.
    pub seed: u64,
}

impl Prompts {
    /// The tokens of prompt `index`.
    #[must_use]
    pub fn tokens(&self, index: u32) -> Vec<u32> {
        let mut state = mix(self.seed ^ mix(u64::from(index) + 1));
        (0..self.length)
            .map(|_| {
                state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
                (mix(state) % u64::from(self.vocab.max(1))) as u32
            })
            .collect()
    }

    /// A number in (0, 1] for arrival `index`.
    fn uniform(&self, index: u32) -> f64 {
        let bits = mix(self.seed.wrapping_add(0xA5A5) ^ mix(u64::from(index))) >> 11;
        (bits + 1) as f64 / (1_u64 << 53) as f64
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Sends the whole load; `on_done` is called as each request ends, for a progress bar.
pub async fn run(client: &Client, load: Load, mut on_done: impl FnMut()) -> Report {
    let client = Arc::new(client.clone());
    let started = Instant::now();
    let mut results: Vec<Result<Timeline, ClientError>> = Vec::new();
    let mut in_flight = FuturesUnordered::new();
    let mut next_arrival = started;
    for index in 0..load.requests {
        if let Some(rate) = load.rate {
            let gap = -load.prompts.uniform(index).ln() / rate.max(1e-9);
            next_arrival += Duration::from_secs_f64(gap.min(3600.0));
            let mut arrival = std::pin::pin!(tokio::time::sleep_until(next_arrival.into()));
            // Streams make progress while the next arrival is waited for.
            loop {
                tokio::select! {
                    () = &mut arrival => break,
                    Some(done) = in_flight.next() => {
                        results.push(done);
                        on_done();
                    }
                }
            }
        }
        while in_flight.len() >= load.concurrency.max(1) as usize {
            if let Some(done) = in_flight.next().await {
                results.push(done);
                on_done();
            }
        }
        let client = Arc::clone(&client);
        in_flight.push(async move {
            let prompt = load.prompts.tokens(index);
            client.completion(&prompt, load.output, StreamEnd::Whole).await
        });
    }
    while let Some(done) = in_flight.next().await {
        results.push(done);
        on_done();
    }
    Report::of(&results, load.prompts.length, started.elapsed())
}
