//! What NVIDIA's management library says of a device: memory, load, power, temperature, clocks, what
//! slows it down, memory errors.
//!
//! The library is opened at run time; without it nothing else is missing. Calls ask the driver and may
//! take a millisecond: none belongs into a step. What a device does not say is `None`.

use libloading::Library;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use thiserror::Error;

const LIBRARY: &str = "libnvidia-ml.so.1";

/// Why there are no figures.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum NvmlError {
    /// No library.
    #[error(
        "{LIBRARY} is not found: it comes with the NVIDIA driver; in a container, ask for the driver capability `utility`"
    )]
    NoLibrary,
    /// The library is too old.
    #[error("{LIBRARY} has no function {name}")]
    NoFunction {
        /// Looked up.
        name: String,
    },
    /// A call failed.
    #[error("{call} failed: {why}")]
    Call {
        /// The library's function.
        call: &'static str,
        /// In the library's words.
        why: String,
    },
}

/// A reason for clocks below what was set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Throttle {
    /// The power limit.
    Power,
    /// Temperature, by the driver's control.
    Thermal,
    /// Temperature, power brake or another protection of the hardware.
    Hardware,
}

impl Throttle {
    /// All of them, with the library's bits.
    const BITS: [(Self, u64); 3] =
        [(Self::Power, 0x04), (Self::Thermal, 0x20), (Self::Hardware, 0x08 | 0x40 | 0x80)];

    fn of(bits: u64) -> Vec<Self> {
        Self::BITS.iter().filter(|(_, of)| bits & of != 0).map(|(reason, _)| *reason).collect()
    }
}

/// What was asked at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GpuFigures {
    /// Bytes of memory taken, by anybody.
    pub memory_used: Option<u64>,
    /// Bytes of memory.
    pub memory_total: Option<u64>,
    /// Share of the last while in which a kernel ran, 0 to 1.
    pub utilisation: Option<f64>,
    /// Watts drawn.
    pub power: Option<f64>,
    /// Degrees Celsius.
    pub temperature: Option<u32>,
    /// Clock of the multiprocessors, in hertz.
    pub sm_clock: Option<u64>,
    /// Clock of the memory, in hertz.
    pub memory_clock: Option<u64>,
    /// What slows it down now; empty where nothing does.
    pub throttled: Option<Vec<Throttle>>,
    /// Memory errors that were corrected since the driver was loaded.
    pub ecc_corrected: Option<u64>,
    /// Those that could not be.
    pub ecc_uncorrected: Option<u64>,
}

/// The library's device handle.
type Handle = *mut c_void;
type Status = c_uint;
type Text = unsafe extern "C" fn(Status) -> *const c_char;
type Plain = unsafe extern "C" fn() -> Status;
type ByBusId = unsafe extern "C" fn(*const c_char, *mut Handle) -> Status;
type Ask<T> = unsafe extern "C" fn(Handle, *mut T) -> Status;
type AskOf<T> = unsafe extern "C" fn(Handle, c_int, *mut T) -> Status;
type AskErrors = unsafe extern "C" fn(Handle, c_int, c_int, *mut u64) -> Status;

/// Mirrors `nvmlMemory_t`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Memory {
    total: u64,
    free: u64,
    used: u64,
}

/// Mirrors `nvmlUtilization_t`, in percent.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Utilisation {
    gpu: c_uint,
    memory: c_uint,
}

const SUCCESS: Status = 0;
const SENSOR_GPU: c_int = 0;
const CLOCK_SM: c_int = 1;
const CLOCK_MEMORY: c_int = 2;
const CORRECTED: c_int = 0;
const UNCORRECTED: c_int = 1;
/// Counted since the driver was loaded.
const VOLATILE: c_int = 0;

/// What is asked of the library.
struct Functions {
    error: Text,
    init: Plain,
    shutdown: Plain,
    by_bus_id: ByBusId,
    memory: Ask<Memory>,
    utilisation: Ask<Utilisation>,
    power: Ask<c_uint>,
    temperature: AskOf<c_uint>,
    clock: AskOf<c_uint>,
    throttled: Ask<u64>,
    errors: AskErrors,
}

impl Functions {
    fn find(library: &Library) -> Result<Self, NvmlError> {
        /// # Safety
        /// `T` is the type that nvml.h gives the function of this name.
        unsafe fn one<T: Copy>(library: &Library, name: &str) -> Result<T, NvmlError> {
            // SAFETY: the caller knows the type; what is copied is called while the library is open.
            let found = unsafe { library.get::<T>(name.as_bytes()) };
            found.map(|symbol| *symbol).map_err(|_| NvmlError::NoFunction { name: name.to_owned() })
        }
        // SAFETY: all types are those of nvml.h.
        unsafe {
            Ok(Self {
                error: one(library, "nvmlErrorString")?,
                init: one(library, "nvmlInit_v2")?,
                shutdown: one(library, "nvmlShutdown")?,
                by_bus_id: one(library, "nvmlDeviceGetHandleByPciBusId_v2")?,
                memory: one(library, "nvmlDeviceGetMemoryInfo")?,
                utilisation: one(library, "nvmlDeviceGetUtilizationRates")?,
                power: one(library, "nvmlDeviceGetPowerUsage")?,
                temperature: one(library, "nvmlDeviceGetTemperature")?,
                clock: one(library, "nvmlDeviceGetClockInfo")?,
                // Named anew in later libraries, which have the old name too.
                throttled: one(library, "nvmlDeviceGetCurrentClocksThrottleReasons")
                    .or_else(|_| one(library, "nvmlDeviceGetCurrentClocksEventReasons"))?,
                errors: one(library, "nvmlDeviceGetTotalEccErrors")?,
            })
        }
    }

    fn check(&self, call: &'static str, status: Status) -> Result<(), NvmlError> {
        if status == SUCCESS {
            return Ok(());
        }
        // SAFETY: the function takes any number and gives a static, terminated string.
        let why = unsafe { CStr::from_ptr((self.error)(status)) };
        Err(NvmlError::Call { call, why: why.to_string_lossy().into_owned() })
    }
}

/// One device in the eyes of the library.
pub struct Nvml {
    device: Handle,
    functions: Functions,
    /// Open as long as functions can be called.
    _library: Library,
}

// SAFETY: the library's functions may be called from any thread, with handles made on another.
unsafe impl Send for Nvml {}
// SAFETY: as above.
unsafe impl Sync for Nvml {}

impl std::fmt::Debug for Nvml {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nvml").finish_non_exhaustive()
    }
}

impl Nvml {
    /// Finds the device at a PCI address, written as `0000:1b:00.0`.
    ///
    /// # Errors
    /// Without the library, or without such a device in it.
    pub fn open(pci: &str) -> Result<Self, NvmlError> {
        // SAFETY: a library of the driver, whose initialisers only prepare itself.
        let library = unsafe { Library::new(LIBRARY) }.map_err(|_| NvmlError::NoLibrary)?;
        let functions = Functions::find(&library)?;
        // SAFETY: no argument; calls are counted, and `drop` gives this one back.
        functions.check("nvmlInit", unsafe { (functions.init)() })?;
        let mut nvml = Self { device: std::ptr::null_mut(), functions, _library: library };
        let address = CString::new(pci).unwrap_or_default();
        // SAFETY: a terminated string, and a pointer to a live handle.
        let found = unsafe { (nvml.functions.by_bus_id)(address.as_ptr(), &raw mut nvml.device) };
        nvml.functions.check("nvmlDeviceGetHandleByPciBusId", found)?;
        Ok(nvml)
    }

    fn ask<T: Default>(&self, call: impl FnOnce(Handle, *mut T) -> Status) -> Option<T> {
        let mut value = T::default();
        (call(self.device, &raw mut value) == SUCCESS).then_some(value)
    }

    /// Asks for everything.
    #[must_use]
    pub fn figures(&self) -> GpuFigures {
        let of = &self.functions;
        // SAFETY: here and below the handle is the library's, and the pointer to a live value of the
        // type that the function writes.
        let memory = self.ask(|device, to| unsafe { (of.memory)(device, to) });
        // SAFETY: as above.
        let load = self.ask(|device, to| unsafe { (of.utilisation)(device, to) });
        // SAFETY: as above.
        let power = self.ask(|device, to| unsafe { (of.power)(device, to) });
        // SAFETY: as above.
        let throttled = self.ask(|device, to| unsafe { (of.throttled)(device, to) });
        // SAFETY: as above.
        let temperature =
            self.ask(|device, to| unsafe { (of.temperature)(device, SENSOR_GPU, to) });
        let clock = |which: c_int| {
            // SAFETY: as above.
            let megahertz = self.ask(|device, to| unsafe { (of.clock)(device, which, to) });
            megahertz.map(|megahertz| u64::from(megahertz) * 1_000_000)
        };
        let errors = |kind: c_int| {
            // SAFETY: as above.
            self.ask(|device, to| unsafe { (of.errors)(device, kind, VOLATILE, to) })
        };
        GpuFigures {
            memory_used: memory.map(|memory| memory.used),
            memory_total: memory.map(|memory| memory.total),
            utilisation: load.map(|load| f64::from(load.gpu) / 100.0),
            power: power.map(|milliwatts| f64::from(milliwatts) / 1e3),
            temperature,
            sm_clock: clock(CLOCK_SM),
            memory_clock: clock(CLOCK_MEMORY),
            throttled: throttled.map(Throttle::of),
            ecc_corrected: errors(CORRECTED),
            ecc_uncorrected: errors(UNCORRECTED),
        }
    }
}

impl Drop for Nvml {
    fn drop(&mut self) {
        // SAFETY: begun in `open`; nothing is asked after this.
        unsafe { (self.functions.shutdown)() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_told_apart() {
        // Idle, and clocks that an application set, are no throttling.
        assert_eq!(Throttle::of(0x1 | 0x2), []);
        assert_eq!(Throttle::of(0x4), [Throttle::Power]);
        assert_eq!(Throttle::of(0x20 | 0x80), [Throttle::Thermal, Throttle::Hardware]);
    }

    #[test]
    fn a_device_says_what_it_does_or_why_it_cannot_be_asked() {
        match Nvml::open("ffff:ff:ff.0") {
            Err(NvmlError::NoLibrary | NvmlError::Call { .. }) => {}
            other => panic!("no such device: {other:?}"),
        }
        let Ok(context) = crate::cuda::Context::open(0) else { return };
        let Ok(nvml) = Nvml::open(&context.facts().pci) else { return };
        let figures = nvml.figures();
        let (used, total) = (figures.memory_used, figures.memory_total);
        assert!(used.zip(total).is_none_or(|(used, total)| used <= total), "{figures:?}");
        assert!(figures.utilisation.is_none_or(|share| (0.0..=1.0).contains(&share)));
    }
}
