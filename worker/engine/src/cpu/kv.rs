//! The cache, and the memory behind it, in the element type that was chosen.
//!
//! On the processor both are plain memory, so a copy is over when the call is: the order of steps is the
//! order of copies. Invariant: a block is copied whole, bit by bit.

use crate::KvDtype;
use crate::copies::{BlockCopy, Way};
use half::bf16;
use half::vec::HalfBitsVecExt;
use ops::paged::{Kv, KvMut};

/// The memory of one element type.
pub(super) struct Blocks<T> {
    cache: Vec<T>,
    host: Vec<T>,
}

impl<T: Copy> Blocks<T> {
    fn copy(&mut self, copies: &[BlockCopy]) {
        for BlockCopy { way, cache, host, len } in copies.iter().copied() {
            let (cache, host) =
                (&mut self.cache[cache..cache + len], &mut self.host[host..host + len]);
            match way {
                Way::Store => host.copy_from_slice(cache),
                Way::Load => cache.copy_from_slice(host),
            }
        }
    }
}

/// The cache.
pub(super) enum KvMemory {
    F32(Blocks<f32>),
    Bf16(Blocks<bf16>),
}

impl KvMemory {
    /// Of `cache` bytes, with `host` bytes behind it.
    pub(super) fn new(dtype: KvDtype, cache: usize, host: usize) -> Self {
        // Zeroed pages come from the system when first touched, so this is quick and lazy: for numbers of the
        // language, while a vector of any other type is written through.
        match dtype {
            KvDtype::F32 => {
                Self::F32(Blocks { cache: vec![0.0; cache / 4], host: vec![0.0; host / 4] })
            }
            KvDtype::Bf16 => {
                let zeros = |bytes| vec![0_u16; bytes / 2].reinterpret_into();
                Self::Bf16(Blocks { cache: zeros(cache), host: zeros(host) })
            }
        }
    }

    pub(super) fn read(&self) -> Kv<'_> {
        match self {
            Self::F32(blocks) => Kv::F32(&blocks.cache),
            Self::Bf16(blocks) => Kv::Bf16(&blocks.cache),
        }
    }

    pub(super) fn write(&mut self) -> KvMut<'_> {
        match self {
            Self::F32(blocks) => KvMut::F32(&mut blocks.cache),
            Self::Bf16(blocks) => KvMut::Bf16(&mut blocks.cache),
        }
    }

    /// Carries copies out, in order.
    pub(super) fn copy(&mut self, copies: &[BlockCopy]) {
        match self {
            Self::F32(blocks) => blocks.copy(copies),
            Self::Bf16(blocks) => blocks.copy(copies),
        }
    }
}
