//! The device's state in the metrics: asked of the driver's management library when somebody scrapes.
//!
//! It touches no step: the server's process asks, the worker's runs the device. Invariant: without the
//! library everything else is as it would be; that is said once.

use engine::{GpuFigures, Nvml, Throttle};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use telemetry::{Clock, EccError, Metrics, Throttling};

/// Scrapes in this time see the same figures.
const FRESH: Duration = Duration::from_secs(1);

/// Feeds the gauges of a device from now on. Returns at once; the library takes a while to open.
pub(super) fn watch(metrics: &Arc<Metrics>, pci: String) {
    let metrics = Arc::clone(metrics);
    let work = move || match Nvml::open(&pci) {
        Ok(nvml) => {
            let asked = Mutex::new(None::<Instant>);
            metrics.before_scrape(move |metrics| {
                let mut asked = asked.lock().unwrap_or_else(PoisonError::into_inner);
                if asked.is_none_or(|at| at.elapsed() >= FRESH) {
                    tell(metrics, &nvml.figures());
                    *asked = Some(Instant::now());
                }
            });
        }
        Err(error) => tracing::info!(%error, "metrics are without the device's state"),
    };
    // Without a thread there are no figures, and nothing else is missing.
    let _ = std::thread::Builder::new().name("gpu state".into()).spawn(work);
}

fn tell(metrics: &Metrics, figures: &GpuFigures) {
    let whole = |number: Option<u64>| i64::try_from(number.unwrap_or(0)).unwrap_or(i64::MAX);
    let gpu = &metrics.gpu;
    gpu.memory_used.set(whole(figures.memory_used));
    gpu.memory_total.set(whole(figures.memory_total));
    gpu.utilisation.set(figures.utilisation.unwrap_or(0.0));
    gpu.power.set(figures.power.unwrap_or(0.0));
    gpu.temperature.set(whole(figures.temperature.map(u64::from)));
    gpu.clock(Clock::Multiprocessors).set(whole(figures.sm_clock));
    gpu.clock(Clock::Memory).set(whole(figures.memory_clock));
    let throttled = figures.throttled.as_deref().unwrap_or_default();
    for (by, reason) in [
        (Throttling::Power, Throttle::Power),
        (Throttling::Thermal, Throttle::Thermal),
        (Throttling::Hardware, Throttle::Hardware),
    ] {
        gpu.throttled(by).set(i64::from(throttled.contains(&reason)));
    }
    gpu.ecc_errors(EccError::Corrected).set(whole(figures.ecc_corrected));
    gpu.ecc_errors(EccError::Uncorrected).set(whole(figures.ecc_uncorrected));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_device_says_is_in_the_metrics() {
        let metrics = Metrics::new("m", "1");
        let figures = GpuFigures {
            memory_used: Some(5),
            power: Some(70.5),
            sm_clock: Some(1_980_000_000),
            throttled: Some(vec![Throttle::Thermal]),
            ..GpuFigures::default()
        };
        tell(&metrics, &figures);
        let text = metrics.render(false);
        for line in [
            "tokenmill_gpu_memory_used_bytes{model_name=\"m\"} 5",
            "tokenmill_gpu_power_watts{model_name=\"m\"} 70.5",
            "tokenmill_gpu_clock_hertz{clock=\"sm\",model_name=\"m\"} 1980000000",
            "tokenmill_gpu_throttled{model_name=\"m\",reason=\"thermal\"} 1",
            "tokenmill_gpu_throttled{model_name=\"m\",reason=\"power\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }
}
