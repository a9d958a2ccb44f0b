//! What serving will take of the machine's memory, said before anything is allocated.
//!
//! Pure arithmetic over a model and limits. Invariant: a plan that is printed as fitting adds up to
//! no more than is available; one that does not fit names the largest context that would.

use crate::model_dir::ModelDir;
use anyhow::{Result, bail};
use std::fmt;

/// Share of available memory that a plan may take on the CPU; the rest is the system's.
const USABLE: f64 = 0.9;
/// KV cache where nobody says how large: enough for this many contexts of the longest kind, if that
/// much is there.
const CONTEXTS: u64 = 8;
/// Bytes of one rank by what holds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemoryPlan {
    /// Matrices and vectors; mapped from the page cache where files are used as they lie.
    pub(crate) weights: u64,
    /// The KV cache.
    pub(crate) kv: u64,
    /// Of the machine's memory, behind the KV cache.
    pub(crate) host: u64,
    /// Activations and scratch of the largest step, and what penalties count in every slot.
    pub(crate) activations: u64,
    /// What the machine has to give, where that is known.
    pub(crate) available: Option<u64>,
    /// Tokens that the KV cache holds.
    pub(crate) kv_tokens: u64,
    /// Tokens that the memory behind it holds.
    pub(crate) host_tokens: u64,
    /// Whether the memory behind it is another than what is available.
    pub(crate) host_apart: bool,
    /// Longest context served.
    pub(crate) max_context: u32,
    /// Ranks that each take as much of the same memory.
    pub(crate) ranks: u32,
}

/// What a plan is made for.
pub(crate) struct Wanted {
    /// Bytes of a matrix element.
    pub(crate) weight_element: usize,
    /// Bytes of a KV element.
    pub(crate) kv_element: usize,
    /// Longest context; the model's own where absent.
    pub(crate) max_context: Option<u32>,
    /// Requests at once.
    pub(crate) max_seqs: u32,
    /// Tokens of the largest step.
    pub(crate) max_step_tokens: u32,
    /// Bytes of the KV cache, where somebody says.
    pub(crate) kv_bytes: Option<u64>,
    /// Bytes of host memory behind it.
    pub(crate) host_bytes: u64,
    /// What serves.
    pub(crate) machine: Machine,
    /// Ranks that share the machine's memory.
    pub(crate) ranks: u32,
}

/// What memory is there.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Machine {
    /// The processor.
    Cpu {
        /// Threads of the backend; each has scratch of its own.
        threads: usize,
        /// What the machine has to give.
        available: Option<u64>,
    },
    /// A CUDA device; activations are of the cache's type.
    Cuda {
        /// Of the device.
        multiprocessors: usize,
        /// Bytes that nobody holds.
        free: u64,
        /// Share of them that may be taken.
        share: f64,
        /// What the machine has to give beside it.
        host: Option<u64>,
    },
}

/// Makes the plan.
///
/// # Errors
/// When the weights alone do not fit, or no context of the wanted length does; the message names the
/// largest that would.
pub(crate) fn plan(dir: &ModelDir, wanted: &Wanted) -> Result<MemoryPlan> {
    let per_token = dir.kv_token_bytes(wanted.kv_element).max(1);
    let own = u32::try_from(dir.program.max_context).unwrap_or(u32::MAX);
    if let Some(asked) = wanted.max_context
        && asked > own
    {
        bail!("--max-model-len {asked} is longer than the model's {own}; lower it");
    }
    let context = wanted.max_context.unwrap_or(own);
    let (weights, activations) = needs(dir, wanted, context);
    let host_tokens = host_tokens(wanted, per_token)?;
    let (available, share) = match wanted.machine {
        Machine::Cpu { available, .. } => (available, USABLE),
        Machine::Cuda { free, share, .. } => (Some(free), share),
    };
    let ranks = u64::from(wanted.ranks.max(1));
    let budget = available.map(|bytes| (bytes as f64 * share) as u64 / ranks);
    let host_apart = matches!(wanted.machine, Machine::Cuda { .. });
    let host = if host_apart { 0 } else { wanted.host_bytes };
    let others = weights.saturating_add(activations).saturating_add(host);
    let left = budget.map(|budget| budget.saturating_sub(others));
    let one = dir.kv_bytes(context, wanted.kv_element);
    let kv = match (wanted.kv_bytes, left, wanted.machine) {
        (Some(bytes), ..) => bytes,
        // Nobody else wants a device's memory; what requests leave behind is found again in it.
        (None, Some(left), Machine::Cuda { .. }) => left,
        (None, Some(left), Machine::Cpu { .. }) => {
            one.saturating_mul(CONTEXTS.min(wanted.max_seqs.into())).min(left)
        }
        (None, None, _) => one,
    };
    if let (Some(budget), Some(left)) = (budget, left)
        && (left == 0 || kv > left)
    {
        bail!(
            "{} {} for weights, {} for activations and {} for the KV cache{}, and {} are \
             usable{}; {}give --kv-cache-memory-bytes at most {left}, lower --max-num-batched-tokens, \
             or free memory",
            if ranks > 1 {
                format!("each of {ranks} ranks needs")
            } else {
                "this needs".to_owned()
            },
            Size(weights),
            Size(activations),
            Size(kv),
            match host {
                0 => String::new(),
                host => format!(" with {} behind it", Size(host)),
            },
            Size(budget),
            match wanted.machine {
                Machine::Cpu { .. } => String::new(),
                Machine::Cuda { free, share, .. } => format!(
                    " ({} are free on the device, --gpu-memory-utilization {share})",
                    Size(free)
                ),
            },
            if host > 0 { "lower --kv-host-memory-bytes, " } else { "" }
        );
    }
    if kv < one {
        let fits = kv / per_token / u64::from(ids::BLOCK_TOKENS) * u64::from(ids::BLOCK_TOKENS);
        bail!(
            "a KV cache of {} holds no context of {context} tokens ({} each); the largest that \
             fits is --max-model-len {fits}",
            Size(kv),
            Size(one)
        );
    }
    Ok(MemoryPlan {
        weights,
        kv,
        activations,
        available,
        kv_tokens: kv / per_token,
        host: wanted.host_bytes,
        host_tokens,
        host_apart,
        max_context: context,
        ranks: wanted.ranks.max(1),
    })
}

/// Tokens that the memory behind the cache holds.
///
/// # Errors
/// When it holds not one block, or a device's machine has not so much.
fn host_tokens(wanted: &Wanted, per_token: u64) -> Result<u64> {
    let bytes = wanted.host_bytes;
    let block = per_token.saturating_mul(ids::BLOCK_TOKENS.into());
    if (1..block).contains(&bytes) {
        bail!(
            "--kv-host-memory-bytes {bytes} holds not one block of {block} bytes; give more, or 0 for none"
        );
    }
    let all = bytes.saturating_mul(wanted.ranks.max(1).into());
    if let Machine::Cuda { host: Some(available), .. } = wanted.machine
        && all > (available as f64 * USABLE) as u64
    {
        bail!(
            "--kv-host-memory-bytes {bytes} is more than nine tenths of the {} that the machine has \
             available; give less",
            Size(available)
        );
    }
    Ok(bytes / block * u64::from(ids::BLOCK_TOKENS))
}

/// Bytes of weights, and of activations and scratch of the largest step.
fn needs(dir: &ModelDir, wanted: &Wanted, context: u32) -> (u64, u64) {
    match wanted.machine {
        Machine::Cpu { threads, .. } => {
            let steps = dir.step_bytes(wanted.max_step_tokens, threads);
            let penalties = dir.penalty_bytes(wanted.max_seqs, context);
            (dir.weight_bytes(wanted.weight_element), steps.saturating_add(penalties))
        }
        Machine::Cuda { multiprocessors, .. } => {
            // Kernels are there before free memory is read.
            let limits = (wanted.max_step_tokens, wanted.max_seqs, context);
            let bytes = dir.cuda_bytes(wanted.kv_element, limits, multiprocessors);
            (bytes.weights, bytes.steps.saturating_add(engine::GRAPH_BYTES))
        }
    }
}

/// Bytes for people.
pub(crate) struct Size(pub(crate) u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = ["B", "KiB", "MiB", "GiB", "TiB"];
        let mut value = self.0 as f64;
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < units.len() {
            value /= 1024.0;
            unit += 1;
        }
        if unit == 0 { write!(f, "{} B", self.0) } else { write!(f, "{value:.1} {}", units[unit]) }
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.ranks > 1 {
            writeln!(f, "memory plan of each of {} ranks", self.ranks)?;
        } else {
            writeln!(f, "memory plan")?;
        }
        writeln!(f, "  weights      {:>12}", Size(self.weights).to_string())?;
        writeln!(f, "  activations  {:>12}", Size(self.activations).to_string())?;
        writeln!(
            f,
            "  KV cache     {:>12}   {} tokens, contexts of up to {}",
            Size(self.kv).to_string(),
            self.kv_tokens,
            self.max_context
        )?;
        if self.host > 0 {
            writeln!(
                f,
                "  behind it    {:>12}   {} tokens, of the machine's memory",
                Size(self.host).to_string(),
                self.host_tokens
            )?;
        }
        let host = if self.host_apart { 0 } else { self.host };
        let one = self.weights + self.activations + self.kv + host;
        write!(f, "  in all       {:>12}", Size(one * u64::from(self.ranks)).to_string())?;
        match self.available {
            Some(bytes) => write!(f, "   of {} available", Size(bytes)),
            None => write!(f, "   (what is available is unknown)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn on_device(free: u64, share: f64, kv_bytes: Option<u64>) -> Result<MemoryPlan> {
        let machine = Machine::Cuda { multiprocessors: 132, free, share, host: None };
        let (kv_element, max_seqs, max_step_tokens) = (2, 16, 512);
        bundled(&Wanted { kv_element, max_seqs, max_step_tokens, kv_bytes, machine, ..SMALL })
    }

    #[test]
    fn a_device_gives_its_cache_what_is_left_of_its_share() {
        let plan = on_device(8 << 30, 0.5, None).expect("a small model");
        let all = plan.weights + plan.activations + plan.kv;
        assert!(all <= 4 << 30 && all + (1 << 20) > 4 << 30, "{all}");
        assert!(plan.kv_tokens > u64::from(plan.max_context));
        let given = on_device(8 << 30, 0.5, Some(1 << 30)).expect("fits");
        assert_eq!(given.kv, 1 << 30);
    }

    #[test]
    fn what_does_not_fit_a_device_is_refused_with_its_numbers() {
        let error = on_device(256 << 20, 0.9, None).expect_err("graphs alone are more").to_string();
        assert!(error.contains("256.0 MiB are free on the device"), "{error}");
        assert!(error.contains("--gpu-memory-utilization 0.9"), "{error}");
        let error = on_device(8 << 30, 0.9, Some(8 << 30)).expect_err("more than its share");
        assert!(error.to_string().contains("8.0 GiB for the KV cache"), "{error}");
    }

    fn bundled(wanted: &Wanted) -> Result<MemoryPlan> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/bundled");
        plan(&ModelDir::read(&folder).expect("the bundled model"), wanted)
    }

    /// Little of everything, on a processor with 1 GiB.
    const SMALL: Wanted = Wanted {
        weight_element: 4,
        kv_element: 4,
        max_context: None,
        max_seqs: 4,
        max_step_tokens: 64,
        kv_bytes: None,
        host_bytes: 0,
        machine: Machine::Cpu { threads: 1, available: Some(1 << 30) },
        ranks: 1,
    };

    #[test]
    fn memory_behind_the_cache_is_the_machines() {
        let of = |host_bytes, machine| bundled(&Wanted { host_bytes, machine, ..SMALL });
        let gpu =
            Machine::Cuda { multiprocessors: 132, free: 8 << 30, share: 0.5, host: Some(1 << 30) };
        let cpu = SMALL.machine;
        let (without, with) = (of(0, gpu).expect("fits"), of(512 << 20, gpu).expect("fits"));
        assert_eq!(with.kv, without.kv, "it takes nothing of the device");
        assert!(with.to_string().contains("behind it       512.0 MiB"), "{with}");
        assert_eq!(without.to_string().lines().count() + 1, with.to_string().lines().count());
        assert!(of(512 << 20, cpu).is_ok());
        let error = of(1 << 30, gpu).expect_err("more than there is").to_string();
        assert!(error.contains("1.0 GiB that the machine has"), "{error}");
        let error = of(1 << 30, cpu).expect_err("more than there is").to_string();
        assert!(error.contains("with 1.0 GiB behind it"), "{error}");
        let error = of(63, cpu).expect_err("not one block").to_string();
        assert!(error.contains("holds not one block"), "{error}");
    }

    #[test]
    fn ranks_share_what_the_machine_has() {
        let of = |ranks, kv_bytes| bundled(&Wanted { kv_bytes, ranks, ..SMALL });
        let (one, four) = (of(1, None).expect("fits"), of(4, None).expect("fits"));
        assert_eq!(one.weights, four.weights, "figures are of one rank");
        assert!(four.to_string().contains("of each of 4 ranks"), "{four}");
        let most = (1 << 30) / 4 - four.weights;
        let error = of(4, Some(most)).expect_err("more than a quarter").to_string();
        assert!(error.contains("each of 4 ranks needs"), "{error}");
    }
}
