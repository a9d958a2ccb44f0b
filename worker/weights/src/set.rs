//! The weights of one model, ready to compute with: as they lie in the mapped files, or in memory of
//! their own where they had to be made.
//!
//! How they get here is the business of `load` (files) and `random`. Invariant: every entry has a
//! type that [`Slice`] can express and as many elements as its shape says, so nothing about a weight
//! can be refused after loading.

use crate::map_file::MappedFile;
use crate::slice::{self, Buffer, Slice};
use safetensors::Dtype;
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// A type that weights are computed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Float {
    /// IEEE single precision.
    F32,
    /// The upper half of a single.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl Float {
    /// The type that a file calls so; none for what cannot be computed with as it is stored.
    #[must_use]
    pub fn of(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F32 => Some(Self::F32),
            Dtype::BF16 => Some(Self::Bf16),
            Dtype::F16 => Some(Self::F16),
            _ => None,
        }
    }

    /// Bytes of an element.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }
}

/// The weights of one model. Share it behind an `Arc`.
#[derive(Debug, Default)]
pub struct Weights {
    pub(crate) entries: BTreeMap<String, Entry>,
    pub(crate) unused: Vec<String>,
}

#[derive(Debug)]
pub(crate) struct Entry {
    pub shape: Vec<usize>,
    pub data: Data,
}

#[derive(Debug)]
pub(crate) enum Data {
    /// Aligned elements of a file.
    Mapped { file: Arc<MappedFile>, bytes: Range<usize>, float: Float },
    /// Elements in memory of their own.
    Made(Buffer),
}

/// One weight.
#[derive(Clone, Copy, Debug)]
pub struct Weight<'a> {
    /// Dimensions of what is held, outermost first; a matrix is `[out, in]`.
    pub shape: &'a [usize],
    /// Its elements, row-major.
    pub data: Slice<'a>,
}

/// A weight that lies in a file as it is used.
#[derive(Clone, Debug)]
pub struct Stored {
    file: Arc<MappedFile>,
    bytes: Range<usize>,
    /// Type of its elements.
    pub float: Float,
}

impl Stored {
    /// Number of elements.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.bytes.len() / self.float.bytes()
    }

    /// Reads bytes from `offset` of the weight on.
    ///
    /// # Errors
    /// The system's; `UnexpectedEof` past the weight's end, and where the file has become shorter.
    pub fn read(&self, offset: usize, to: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(to.len()).filter(|end| *end <= self.bytes.len());
        end.ok_or(io::ErrorKind::UnexpectedEof)?;
        self.file.read((self.bytes.start + offset) as u64, to)
    }

    /// The file it lies in.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.file.path()
    }
}

impl Weights {
    /// Where a weight lies in a file; none where it is in memory of its own, or was not asked for.
    #[must_use]
    pub fn stored(&self, name: &str) -> Option<Stored> {
        match &self.entries.get(name)?.data {
            Data::Mapped { file, bytes, float } => {
                Some(Stored { file: Arc::clone(file), bytes: bytes.clone(), float: *float })
            }
            Data::Made(_) => None,
        }
    }

    /// A weight by name; none where it was not asked for at loading.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<Weight<'_>> {
        let entry = self.entries.get(name)?;
        Some(Weight { shape: &entry.shape, data: entry.data.slice() })
    }

    /// Tensors of the checkpoint that nothing asked for. Some families publish extra ones (further
    /// prediction layers); others mean that the architecture is not the one loaded.
    #[must_use]
    pub fn unused(&self) -> &[String] {
        &self.unused
    }

    /// Bytes of all elements, wherever they lie.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        self.entries.values().map(|entry| entry.data.slice().bytes()).sum()
    }

    /// Bytes in memory of their own, apart from the page cache.
    #[must_use]
    pub fn made_bytes(&self) -> u64 {
        let made = self.entries.values().map(|entry| match &entry.data {
            Data::Made(buffer) => buffer.slice().bytes(),
            Data::Mapped { .. } => 0,
        });
        made.sum()
    }
}

impl Data {
    fn slice(&self) -> Slice<'_> {
        match self {
            Self::Made(buffer) => buffer.slice(),
            Self::Mapped { file, bytes, float } => {
                let bytes = &file.bytes()[bytes.clone()];
                let aligned = "only aligned tensors are mapped";
                match float {
                    Float::F32 => Slice::F32(slice::borrow(bytes).expect(aligned)),
                    Float::Bf16 => Slice::Bf16(slice::borrow(bytes).expect(aligned)),
                    Float::F16 => Slice::F16(slice::borrow(bytes).expect(aligned)),
                }
            }
        }
    }

    /// The bytes of the file, where that is where they lie.
    pub(crate) fn mapped(&self) -> Option<&[u8]> {
        match self {
            Self::Mapped { file, bytes, .. } => Some(&file.bytes()[bytes.clone()]),
            Self::Made(_) => None,
        }
    }
}
