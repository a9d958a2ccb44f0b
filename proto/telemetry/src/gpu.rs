//! Gauges of the device that runs the model.
//!
//! They hold what was last told; who tells, and when, is decided elsewhere. Without a device, or where
//! it does not say, they stay at zero.

use crate::label::{Clock, EccError, Throttling};
use crate::metrics::Maker;
use prometheus::{Gauge, IntGauge, IntGaugeVec};

/// The device's state.
#[derive(Debug)]
pub struct GpuMetrics {
    /// Bytes taken, by anybody.
    pub memory_used: IntGauge,
    /// Bytes there are.
    pub memory_total: IntGauge,
    /// 0 to 1.
    pub utilisation: Gauge,
    /// Watts.
    pub power: Gauge,
    /// Degrees Celsius.
    pub temperature: IntGauge,
    clocks: IntGaugeVec,
    throttled: IntGaugeVec,
    ecc_errors: IntGaugeVec,
}

impl GpuMetrics {
    pub(crate) fn new(make: &Maker<'_>) -> Self {
        let gpu = Self {
            memory_used: make
                .gauge("gpu_memory_used_bytes", "Device memory taken, by any process."),
            memory_total: make.gauge("gpu_memory_bytes", "Device memory."),
            utilisation: make.ratio(
                "gpu_utilization_ratio",
                "Share of the last while in which the device ran a kernel, 0 to 1.",
            ),
            power: make.ratio("gpu_power_watts", "Power that the device draws."),
            temperature: make.gauge("gpu_temperature_celsius", "Temperature of the device."),
            clocks: make.gauges("gpu_clock_hertz", "Clocks of the device.", &["clock"]),
            throttled: make.gauges(
                "gpu_throttled",
                "1 where clocks are lowered for this reason.",
                &["reason"],
            ),
            ecc_errors: make.gauges(
                "gpu_ecc_errors",
                "Errors of the device's memory since its driver was loaded.",
                &["kind"],
            ),
        };
        Clock::ALL.iter().for_each(|of| drop(gpu.clock(*of)));
        Throttling::ALL.iter().for_each(|of| drop(gpu.throttled(*of)));
        EccError::ALL.iter().for_each(|of| drop(gpu.ecc_errors(*of)));
        gpu
    }

    /// Hertz.
    #[must_use]
    pub fn clock(&self, of: Clock) -> IntGauge {
        self.clocks.with_label_values(&[of.as_str()])
    }

    /// 1 where it slows the device down.
    #[must_use]
    pub fn throttled(&self, by: Throttling) -> IntGauge {
        self.throttled.with_label_values(&[by.as_str()])
    }

    /// How many.
    #[must_use]
    pub fn ecc_errors(&self, of: EccError) -> IntGauge {
        self.ecc_errors.with_label_values(&[of.as_str()])
    }
}
