//! Steps of few rows, where a product norms its rows itself, and the one in front adds its results to the
//! residual: a launch less for every norm.
//!
//! It launches nothing of its own, and what it decides it decides for whoever walks: the tests of `units` go
//! the same way, and see that nothing is stored where other blocks read. Invariant: results are those of the
//! launches one by one, to the bit; whatever the norm would have stored is stored.

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

/// Who goes through launches in their order: a step, which enqueues them, or a test, which looks where their
/// operands lie. `U` is a launch, or what becomes one.
pub(super) trait Walker<U> {
    /// A norm that another launch may make.
    type Norm<'u>: Copy
    where
        U: 'u;
    type Error;

    /// The norm that a launch is, and nothing else.
    fn norm<'u>(&self, unit: &'u U) -> Option<Self::Norm<'u>>;

    /// The norm of a residual to which `norm` adds what `product` makes.
    fn sum<'u>(&self, product: &'u U, norm: &'u U) -> Option<Self::Norm<'u>>;

    /// The norm at the end of a launch, which can be left to another.
    fn last<'u>(&self, unit: &'u U) -> Option<Self::Norm<'u>>;

    /// Whether a launch makes the norm in front of it.
    fn folds(&self, unit: &U, norm: &Self::Norm<'_>) -> bool;

    /// Launches a product that is added to the residual of the norm behind; `false`, and nothing launched, where
    /// its kernel cannot.
    fn add(&mut self, product: &U, norm: &Self::Norm<'_>) -> Result<bool, Self::Error>;

    /// Launches a unit with the norm in front of it, if one is left to it, and `unnormed` without its last.
    fn run_one(
        &mut self,
        unit: &U,
        norm: Option<&Self::Norm<'_>>,
        unnormed: bool,
    ) -> Result<(), Self::Error>;
}

/// Goes through units, norms left to launches behind them where those take them.
pub(super) fn walk<'u, U, W: Walker<U>>(walker: &mut W, units: &'u [U]) -> Result<(), W::Error> {
    let mut rest = units;
    let mut left: Option<W::Norm<'u>> = None;
    while let [unit, after @ ..] = rest {
        rest = after;
        let norm = left.take();
        if norm.is_none() {
            left = walker.norm(unit).filter(|norm| takes(walker, after, norm));
            if left.is_some() {
                continue;
            }
            if let [second, behind @ ..] = after
                && let Some(sum) = walker.sum(unit, second)
                && takes(walker, behind, &sum)
                && walker.add(unit, &sum)?
            {
                (left, rest) = (Some(sum), behind);
                continue;
            }
        }
        left = walker.last(unit).filter(|last| takes(walker, after, last));
        walker.run_one(unit, norm.as_ref(), left.is_some())?;
    }
    Ok(())
}

/// Whether the first of `units` makes the norm in front of it.
fn takes<U, W: Walker<U>>(walker: &W, units: &[U], norm: &W::Norm<'_>) -> bool {
    units.first().is_some_and(|next| walker.folds(next, norm))
}

/// Where the operands of a product lie.
struct At {
    x: DeviceSlice,
    out: DeviceSlice,
    normed: DeviceSlice,
}

impl Walker<Launch> for Step<'_> {
    type Norm<'u> = Fold<'u>;
    type Error = CudaError;

    fn norm<'u>(&self, launch: &'u Launch) -> Option<Fold<'u>> {
        let Launch::Norm { x, weight, eps, out } = launch else { return None };
        Some(Fold { x: *x, weight, eps: *eps, out: *out })
    }

    fn sum<'u>(&self, product: &'u Launch, norm: &'u Launch) -> Option<Fold<'u>> {
        let Launch::Linear { out: sum, .. } = product else { return None };
        let Launch::AddNorm { delta, residual, weight, eps, out } = norm else { return None };
        (sum == delta).then_some(Fold { x: *residual, weight, eps: *eps, out: *out })
    }

    fn last<'u>(&self, launch: &'u Launch) -> Option<Fold<'u>> {
        let Launch::Moe(layer) = launch else { return None };
        self.few_always(layer)?;
        let MoeLayer { residual, weight, eps, out, .. } = &**layer;
        Some(Fold { x: *residual, weight, eps: *eps, out: *out })
    }

    fn folds(&self, launch: &Launch, fold: &Fold<'_>) -> bool {
        self.products(launch, fold, |_| ()).is_some()
    }

    fn add(&mut self, product: &Launch, norm: &Fold<'_>) -> Result<bool, CudaError> {
        let Launch::Linear { x, w, bias, .. } = product else { return Ok(false) };
        let (residual, from, to) = (norm.x, self.at(*x), self.at(norm.x));
        let plain = self.product((*x, &from), w, bias.as_ref(), (residual, &to));
        let added = Linear { then: Then::Add, ..plain };
        if !streams(self.rows.padded, &added) {
            return Ok(false);
        }
        linear_as(Variant::Stream, self.on, self.rows, &added).map(|()| true)
    }

    fn run_one(
        &mut self,
        launch: &Launch,
        norm: Option<&Fold<'_>>,
        unnormed: bool,
    ) -> Result<(), CudaError> {
        match (launch, norm) {
            (Launch::Moe(layer), norm) => self.moe(layer, norm, unnormed),
            (launch, Some(fold)) => self.normed(launch, fold),
            (launch, None) => self.run(launch),
        }
    }
}

impl Step<'_> {
    /// Enqueues launches in their order.
    pub(super) fn run_all(&self, launches: &[Launch]) -> Result<(), CudaError> {
        walk(&mut { *self }, launches)
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

    /// A launch that makes the norm in front of it.
    pub(super) fn normed(&self, launch: &Launch, fold: &Fold<'_>) -> Result<(), CudaError> {
        let launched =
            self.products(launch, fold, |one| linear_as(Variant::Stream, self.on, self.rows, one));
        let why = || "a norm that nobody makes".to_owned();
        launched.unwrap_or_else(|| Err(CudaError::Shape { op: "rms_norm", why: why() }))
    }
}
