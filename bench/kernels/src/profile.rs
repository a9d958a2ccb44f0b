//! Cases for a profiler: one launch of each where it looks, everything else where it does not.
//!
//! It times nothing, since launches under a profiler take as long as its counters want. Invariant: what the
//! profiler sees was right in this run and has run before.

use crate::case::Case;
use crate::near::Failure;
use crate::rig::Rig;

/// A device and its kernels.
pub struct Profile {
    rig: Rig,
}

impl std::fmt::Debug for Profile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Profile").finish_non_exhaustive()
    }
}

impl Profile {
    /// Opens the first device.
    ///
    /// # Errors
    /// Without a device or kernels for it ([`Failure::is_absent`]), or when either fails.
    pub fn open() -> Result<Self, Failure> {
        Ok(Self { rig: Rig::open()? })
    }

    /// Checks a case, then launches it once over operands that the check did not use where there are
    /// others. Returns how many kernels the profiler saw.
    ///
    /// # Errors
    /// When its results are wrong, or the device fails.
    pub fn launch(&mut self, case: &Case) -> Result<u64, Failure> {
        self.rig.clear();
        let ready = case.setup(&mut self.rig)?;
        (ready.check)(&self.rig, &ready.launch)?;
        let (rig, set) = (&self.rig, 1 % ready.sets);
        let before = rig.stream.launched();
        rig.context().profiled(|| (ready.launch)(rig.queue(), set).map_err(Failure::from))?;
        Ok(rig.stream.launched() - before)
    }
}
