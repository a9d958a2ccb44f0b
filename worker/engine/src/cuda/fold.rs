//! Steps of few rows, where a product norms its rows itself, and the one in front adds its results to the
//! residual: a launch less for every norm.
//!
//! It decides and launches nothing of its own. Invariant: results are those of the launches one by one,
//! to the bit; whatever the norm would have stored is stored. What is launched so is described in the tests of
//! `units`, too, which see that nothing is stored where other blocks read.

use super::launch::{Launch, Place};
use super::moe_layer::Layer as MoeLayer;
use super::run::Step;
use device::cuda::{CudaError, DeviceSlice};
use ops::linear::cuda::{Linear, Normed, Then, Variant, linear_as, streams};

/// A norm that the launch behind it makes.
#[derive(Clone, Copy)]
pub(super) struct Fold<'a> {
    /// Rows before.
    pub(super) x: Place,
    pub(super) weight: &'a DeviceSlice,
    pub(super) eps: f32,
    /// And after.
    pub(super) out: Place,
}

/// Where the operands of a product lie.
struct At {
    x: DeviceSlice,
    out: DeviceSlice,
    normed: DeviceSlice,
}

impl Step<'_> {
    /// Enqueues launches in their order.
    pub(super) fn run_all(&self, launches: &[Launch]) -> Result<(), CudaError> {
        let mut rest = launches;
        let mut norm = None;
        while let [launch, after @ ..] = rest {
            (norm, rest) = match (launch, after) {
                (Launch::Norm { x, weight, eps, out }, [next, ..]) if norm.is_none() => {
                    let fold = Fold { x: *x, weight, eps: *eps, out: *out };
                    let folded = self.folds(next, &fold);
                    if !folded {
                        self.run(launch)?;
                    }
                    (folded.then_some(fold), after)
                }
                (
                    Launch::Linear { out: sum, .. },
                    [Launch::AddNorm { delta, residual, weight, eps, out }, next, ..],
                ) if norm.is_none() && sum == delta => {
                    let fold = Fold { x: *residual, weight, eps: *eps, out: *out };
                    if self.folds(next, &fold) && self.added(launch, *residual)? {
                        (Some(fold), &after[1..])
                    } else {
                        self.run(launch)?;
                        (None, after)
                    }
                }
                (Launch::Moe(layer), [next, ..]) if self.few_always(layer).is_some() => {
                    let MoeLayer { residual, weight, eps, out, .. } = &**layer;
                    let fold = Fold { x: *residual, weight, eps: *eps, out: *out };
                    let folded = self.folds(next, &fold);
                    self.moe(layer, norm.as_ref(), folded)?;
                    (folded.then_some(fold), after)
                }
                _ => {
                    match &norm {
                        Some(fold) => self.normed(launch, fold)?,
                        None => self.run(launch)?,
                    }
                    (None, after)
                }
            };
        }
        Ok(())
    }

    /// A product added to the residual, if its kernel can.
    fn added(&self, launch: &Launch, residual: Place) -> Result<bool, CudaError> {
        let Launch::Linear { x, w, bias, .. } = launch else { return Ok(false) };
        let (from, to) = (self.at(*x), self.at(residual));
        let plain = self.product((*x, &from), w, bias.as_ref(), (residual, &to));
        let added = Linear { then: Then::Add, ..plain };
        if !streams(self.rows.padded, &added) {
            return Ok(false);
        }
        linear_as(Variant::Stream, self.on, self.rows, &added).map(|()| true)
    }

    fn places(&self, fold: &Fold<'_>, out: Place) -> At {
        At { x: self.at(fold.x), out: self.at(out), normed: self.at(fold.out) }
    }

    /// A product of rows that it norms; `None` where it is of others.
    fn folded<'a>(
        &self,
        launch: &'a Launch,
        fold: &Fold<'a>,
        at: &'a At,
        out: Place,
    ) -> Option<Linear<'a>> {
        let Launch::Linear { x, w, bias, .. } = launch else { return None };
        let norm = Some(Normed { weight: fold.weight, eps: fold.eps, out: &at.normed });
        let plain = self.product((fold.x, &at.x), w, bias.as_ref(), (out, &at.out));
        (*x == fold.out).then_some(Linear { norm, ..plain })
    }

    /// Calls `each` with the product of a launch whose rows are normed there, if kernels take it; the answer
    /// is nothing where they do not.
    fn products<T>(
        &self,
        launch: &Launch,
        fold: &Fold<'_>,
        each: impl FnOnce(&Linear<'_>) -> T,
    ) -> Option<T> {
        let rows = self.rows.padded;
        match launch {
            Launch::Linear { out, .. } => {
                let at = self.places(fold, *out);
                let one = self.folded(launch, fold, &at, *out)?;
                streams(rows, &one).then(|| each(&one))
            }
            Launch::Gated { product, act } => {
                let Launch::SiluMul { out, .. } = &**act else { return None };
                let at = self.places(fold, *out);
                let plain = self.folded(product, fold, &at, *out)?;
                let gated = Linear { then: Then::Gate, ..plain };
                (gated.bias.is_none() && streams(rows, &gated)).then(|| each(&gated))
            }
            Launch::Moe(layer) => {
                self.few_always(layer)?;
                self.products(&layer.score, fold, each)
            }
            _ => None,
        }
    }

    /// Whether a launch makes the norm in front of it.
    fn folds(&self, launch: &Launch, fold: &Fold<'_>) -> bool {
        self.products(launch, fold, |_| ()).is_some()
    }

    /// A launch that makes the norm in front of it.
    pub(super) fn normed(&self, launch: &Launch, fold: &Fold<'_>) -> Result<(), CudaError> {
        if let Launch::Moe(layer) = launch {
            return self.moe(layer, Some(fold), false);
        }
        let launched =
            self.products(launch, fold, |one| linear_as(Variant::Stream, self.on, self.rows, one));
        let why = || "a norm that nobody makes".to_owned();
        launched.unwrap_or_else(|| Err(CudaError::Shape { op: "rms_norm", why: why() }))
    }
}
