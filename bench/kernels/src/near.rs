//! Whether results are what they should be, and what can go wrong with a case.

use device::cuda::CudaError;

/// Why a case has no figure.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The device failed, is absent, or takes no such launch.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// A kernel computed something else.
    #[error("{what}: {got} instead of {expected}")]
    Wrong {
        /// Which result.
        what: String,
        /// From the device.
        got: String,
        /// From the reference.
        expected: String,
    },
}

impl Failure {
    /// Whether there is nothing to measure on: no driver, no device, or no kernels for it.
    #[must_use]
    pub const fn is_absent(&self) -> bool {
        use CudaError::{NoDevice, NoDriver, NoKernels};
        matches!(self, Self::Cuda(NoDriver | NoDevice { .. } | NoKernels { .. }))
    }
}

/// Whether every element is within `tolerance` of what is expected, relative to its own size plus that
/// of a typical element. NaN is wrong.
pub(crate) fn near(
    what: &str,
    got: &[f32],
    expected: &[f64],
    tolerance: f64,
) -> Result<(), Failure> {
    let squares: f64 = expected.iter().map(|e| e * e).sum();
    let typical = (squares / expected.len().max(1) as f64).sqrt();
    let sizes: Vec<f64> = expected.iter().map(|e| e.abs() + typical).collect();
    near_of(what, got, expected, &sizes, tolerance)
}

/// The same with `tolerance` relative to the size that is given for each element: where summands were
/// rounded, that of them, which may be far larger than their sum.
pub(crate) fn near_of(
    what: &str,
    got: &[f32],
    expected: &[f64],
    sizes: &[f64],
    tolerance: f64,
) -> Result<(), Failure> {
    if got.len() != expected.len() || got.len() != sizes.len() {
        let lens = [got.len(), expected.len()].map(|len| format!("{len} elements"));
        let [got, expected] = lens;
        return Err(Failure::Wrong { what: what.to_owned(), got, expected });
    }
    for (i, ((got, expected), size)) in got.iter().zip(expected).zip(sizes).enumerate() {
        let allowed = tolerance * size;
        // Not the opposite of `>`: NaN is never within anything.
        if (f64::from(*got) - expected).abs() <= allowed {
            continue;
        }
        return Err(Failure::Wrong {
            what: format!("{what}, element {i}"),
            got: got.to_string(),
            expected: format!("{expected} within {allowed}"),
        });
    }
    Ok(())
}

/// Whether both are the same to the bit.
pub(crate) fn equal<T: PartialEq + std::fmt::Debug>(
    what: &str,
    got: &[T],
    expected: &[T],
) -> Result<(), Failure> {
    let differs = got.iter().zip(expected).position(|(got, expected)| got != expected);
    let at = differs.or((got.len() != expected.len()).then_some(got.len().min(expected.len())));
    at.map_or(Ok(()), |at| {
        Err(Failure::Wrong {
            what: format!("{what}, element {at}"),
            got: format!("{:?}", got.get(at)),
            expected: format!("{:?}", expected.get(at)),
        })
    })
}

/// Numbers below `all` spread evenly, the first and the last among them.
pub(crate) fn some(all: usize, wanted: usize) -> Vec<usize> {
    let wanted = wanted.min(all);
    let mut some: Vec<usize> =
        (0..wanted).map(|i| if wanted == 1 { 0 } else { i * (all - 1) / (wanted - 1) }).collect();
    some.dedup();
    some
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_found() {
        assert!(near("x", &[1.0, 2.0], &[1.001, 2.0], 4e-3).is_ok());
        assert!(near("x", &[1.0, 2.0], &[1.1, 2.0], 4e-3).is_err());
        assert!(near("x", &[f32::NAN, 2.0], &[1.0, 2.0], 4e-3).is_err());
        assert!(near("x", &[1.0], &[1.0, 2.0], 4e-3).is_err());
        assert!(near("x", &[1.0], &[f64::NAN], 4e-3).is_err());
        assert!(near("x", &[], &[], 4e-3).is_ok());
        assert!(near_of("x", &[0.03], &[0.0], &[8.0], 4e-3).is_ok());
        assert!(near_of("x", &[0.03], &[0.0], &[7.0], 4e-3).is_err());
        assert!(near_of("x", &[f32::NAN], &[0.0], &[8.0], 4e-3).is_err());
        assert!(equal("x", &[1, 2], &[1, 2]).is_ok());
        assert!(equal("x", &[1, 2], &[1, 3]).is_err());
        assert!(equal("x", &[1, 2], &[1]).is_err());
    }

    #[test]
    fn some_have_both_ends() {
        assert_eq!(some(0, 4), []);
        assert_eq!(some(1, 4), [0]);
        assert_eq!(some(3, 8), [0, 1, 2]);
        assert_eq!(some(100, 3), [0, 49, 99]);
        assert_eq!(some(5, 1), [0]);
    }
}
