//! A checkpoint folder: one safetensors file, or several under an index, opened and checked whole.
//!
//! It reads headers and the index only; data is paged in when used. It does not know a model, and
//! it cannot see a bit flipped inside of data: digests are compared where files are downloaded.
//!
//! Invariant: after [`Checkpoint::open`] each name leads to exactly one tensor, whose bytes lie
//! within its file.

use crate::error::{CheckpointError, Defect};
use crate::header::{self, Index};
use crate::map_file::MappedFile;
use crate::slice::{self, Buffer, Slice};
use safetensors::tensor::Dtype;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A checkpoint in one file.
pub(crate) const SINGLE_FILE: &str = "model.safetensors";
/// The index of a checkpoint in several.
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";
/// Longest index that is read, in bytes. The largest published (some 100,000 tensors) take 10 MB.
const MAX_INDEX: u64 = 256 << 20;

/// An opened checkpoint. Cheap to share behind an `Arc`; holds a file descriptor per file.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    files: Vec<Arc<MappedFile>>,
    tensors: BTreeMap<String, Place>,
}

/// Where a tensor lies.
#[derive(Debug)]
struct Place {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

/// One tensor, as it lies in the file.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Name in the checkpoint.
    pub name: &'a str,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, outermost first; a weight matrix is `[out, in]`.
    pub shape: &'a [usize],
    /// Row-major little-endian elements, with no promise of alignment.
    pub bytes: &'a [u8],
    /// The file it lies in.
    pub file: &'a Path,
    /// Where in the file it starts, in bytes.
    pub offset: usize,
}

impl Checkpoint {
    /// Opens the checkpoint in a folder and checks every header against its file and the index.
    ///
    /// # Errors
    /// See [`CheckpointError`]: nothing of a damaged checkpoint is usable.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let index_path = dir.join(INDEX_FILE);
        let single = dir.join(SINGLE_FILE).exists();
        if !index_path.exists() {
            if !single {
                return Err(CheckpointError::NoWeights { dir: dir.to_owned() });
            }
            let mut checkpoint = Self::empty(dir);
            checkpoint.add_file(SINGLE_FILE, None)?;
            return Ok(checkpoint);
        }
        let index = read_index(&index_path)?;
        let files = index.files();
        if single && !files.contains(SINGLE_FILE) {
            return Err(CheckpointError::Ambiguous { dir: dir.to_owned() });
        }
        let mut checkpoint = Self::empty(dir);
        for file in files {
            checkpoint.add_file(file, Some(&index))?;
        }
        // Each file held only what the index places in it; now nothing may be left over.
        for (tensor, file) in &index.weight_map {
            if !checkpoint.tensors.contains_key(tensor) {
                let defect = Defect::Missing { tensor: tensor.clone() };
                return Err(CheckpointError::Damaged { file: dir.join(file), defect });
            }
        }
        Ok(checkpoint)
    }

    fn empty(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), files: Vec::new(), tensors: BTreeMap::new() }
    }

    fn add_file(&mut self, name: &str, index: Option<&Index>) -> Result<(), CheckpointError> {
        let path = self.dir.join(name);
        let damaged = |defect| CheckpointError::Damaged { file: path.clone(), defect };
        let mapped = MappedFile::open(&path).map_err(|source| {
            let awaited = index.and_then(|i| i.weight_map.iter().find(|(_, file)| *file == name));
            match awaited {
                Some((tensor, _)) if source.kind() == io::ErrorKind::NotFound => {
                    CheckpointError::NoFile { file: path.clone(), tensor: tensor.clone() }
                }
                _ => CheckpointError::Io { file: path.clone(), source },
            }
        })?;
        let entries = header::parse(mapped.bytes()).map_err(damaged)?;
        let file = self.files.len();
        for entry in entries {
            let at = entry.bytes.start as u64;
            if let Some(index) = index {
                match index.weight_map.get(&entry.name) {
                    Some(home) if home == name => {}
                    Some(home) => {
                        let home = home.clone();
                        return Err(damaged(Defect::Duplicate { tensor: entry.name, at, home }));
                    }
                    None => return Err(damaged(Defect::Unlisted { tensor: entry.name, at })),
                }
            }
            let header::Entry { name, dtype, shape, bytes } = entry;
            self.tensors.insert(name, Place { file, dtype, shape, bytes });
        }
        self.files.push(mapped);
        Ok(())
    }

    /// The folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Bytes of tensor data in all files.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        self.tensors.values().map(|place| place.bytes.len() as u64).sum()
    }

    /// Every tensor, in the order of names.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = TensorView<'_>> {
        self.tensors.iter().map(|(name, place)| self.view(name, place))
    }

    /// Whether there is a tensor of this name.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// A tensor by name.
    ///
    /// # Errors
    /// [`CheckpointError::NoTensor`].
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, CheckpointError> {
        let (name, place) = self.tensors.get_key_value(name).ok_or_else(|| {
            CheckpointError::NoTensor { dir: self.dir.clone(), tensor: name.to_owned() }
        })?;
        Ok(self.view(name, place))
    }

    /// The file that holds a tensor of this checkpoint, kept open, and its place there.
    pub(crate) fn mapped(&self, view: &TensorView<'_>) -> (Arc<MappedFile>, Range<usize>) {
        let place = &self.tensors[view.name];
        (Arc::clone(&self.files[place.file]), place.bytes.clone())
    }

    fn view<'a>(&'a self, name: &'a str, place: &'a Place) -> TensorView<'a> {
        let file = &self.files[place.file];
        TensorView {
            name,
            dtype: place.dtype,
            shape: &place.shape,
            bytes: &file.bytes()[place.bytes.clone()],
            file: file.path(),
            offset: place.bytes.start,
        }
    }
}

impl<'a> TensorView<'a> {
    /// The elements as they lie in the file.
    ///
    /// None where the file put them at an address that their type does not allow (files whose header
    /// is not padded), and for types other than F32, BF16 and F16; see [`TensorView::to_buffer`].
    #[must_use]
    pub fn slice(&self) -> Option<Slice<'a>> {
        match self.dtype {
            Dtype::F32 => slice::borrow(self.bytes).map(Slice::F32),
            Dtype::BF16 => slice::borrow(self.bytes).map(Slice::Bf16),
            Dtype::F16 => slice::borrow(self.bytes).map(Slice::F16),
            _ => None,
        }
    }

    /// The elements in memory of their own, for data that is not aligned in its file.
    ///
    /// # Errors
    /// [`CheckpointError::WrongDtype`] for types other than F32, BF16 and F16.
    pub fn to_buffer(&self) -> Result<Buffer, CheckpointError> {
        match self.dtype {
            Dtype::F32 => Ok(Buffer::F32(slice::numbers(self.bytes).collect())),
            Dtype::BF16 => Ok(Buffer::Bf16(slice::numbers(self.bytes).collect())),
            Dtype::F16 => Ok(Buffer::F16(slice::numbers(self.bytes).collect())),
            _ => Err(self.wrong_dtype("F32, BF16 or F16")),
        }
    }

    /// The elements widened to single precision: for norms and biases, which are small.
    ///
    /// # Errors
    /// [`CheckpointError::WrongDtype`] for types other than F32, BF16 and F16.
    pub fn to_f32(&self) -> Result<Cow<'a, [f32]>, CheckpointError> {
        match self.slice() {
            Some(Slice::F32(data)) => Ok(Cow::Borrowed(data)),
            Some(data) => Ok(Cow::Owned(data.to_f32())),
            None => Ok(Cow::Owned(self.to_buffer()?.slice().to_f32())),
        }
    }

    /// Holds the tensor to a shape.
    ///
    /// # Errors
    /// [`CheckpointError::WrongShape`].
    pub fn expect_shape(self, wanted: &[usize]) -> Result<Self, CheckpointError> {
        if self.shape == wanted {
            return Ok(self);
        }
        Err(CheckpointError::WrongShape {
            file: self.file.to_owned(),
            tensor: self.name.to_owned(),
            found: self.shape.to_vec(),
            wanted: wanted.to_vec(),
        })
    }

    /// The refusal of an element that is no number, by its place in the tensor.
    pub(crate) fn no_number(&self, element: usize) -> CheckpointError {
        let at = self.offset as u64 + (element * self.dtype.bitsize() / 8) as u64;
        let defect = Defect::NotANumber { tensor: self.name.to_owned(), element, at };
        CheckpointError::Damaged { file: self.file.to_owned(), defect }
    }

    pub(crate) fn wrong_dtype(&self, wanted: &'static str) -> CheckpointError {
        CheckpointError::WrongDtype {
            file: self.file.to_owned(),
            tensor: self.name.to_owned(),
            found: self.dtype,
            wanted,
        }
    }
}

fn read_index(path: &Path) -> Result<Index, CheckpointError> {
    let io = |source| CheckpointError::Io { file: path.to_owned(), source };
    let len = fs::metadata(path).map_err(io)?.len();
    if len > MAX_INDEX {
        return Err(io(io::Error::other(format!(
            "{len} bytes long, more than an index ever is ({MAX_INDEX})"
        ))));
    }
    let text = fs::read(path).map_err(io)?;
    Index::parse(&text).map_err(|defect| CheckpointError::Damaged { file: path.to_owned(), defect })
}
