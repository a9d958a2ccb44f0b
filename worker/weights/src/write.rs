//! Random checkpoints as files: safetensors in the layout that every engine reads, in shards with
//! an index above a size limit, beside a copy of their `config.json`.
//!
//! Values are made in pieces by several threads and written at their place, so memory stays at a few
//! pieces whatever the model. It does not know which tensors a model has.
//!
//! Invariant: a name is visible in the folder only when its file is complete and synced; the
//! index, or the single file, comes last, so that an interrupted run leaves no checkpoint to open.

use crate::checkpoint::{INDEX_FILE, SINGLE_FILE};
use crate::parallel;
use crate::progress::{Progress, Stage, Tally};
use crate::random::{Fill, RandomError, RandomModel, TensorSpec};
use crate::set::Float;
use crate::slice::Element;
use half::{bf16, f16};
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use zerocopy::IntoBytes;

/// Bytes of data per file unless told otherwise.
pub const DEFAULT_SHARD_BYTES: u64 = 5_000_000_000;
/// Elements that one job makes and writes.
const CHUNK: usize = 1 << 20;
/// Headers are padded so that data starts at a multiple of this.
const ALIGNMENT: usize = 8;

/// How files are written.
#[derive(Clone, Debug)]
pub struct WriteOptions {
    /// Most bytes of data per file; a larger tensor gets a file of its own.
    pub shard_bytes: u64,
    /// Threads that make values and write.
    pub threads: usize,
}

impl Default for WriteOptions {
    fn default() -> Self {
        Self { shard_bytes: DEFAULT_SHARD_BYTES, threads: parallel::available_threads() }
    }
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// The files of tensors, in the order of their names.
    pub files: Vec<PathBuf>,
    /// Bytes of tensor data.
    pub data_bytes: u64,
}

/// A checkpoint that could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The folder holds a checkpoint already.
    #[error("{file}: exists; name another folder, or remove the checkpoint there")]
    Exists {
        /// What stands in the way.
        file: PathBuf,
    },
    /// Two tensors of one name.
    #[error("tensor `{tensor}` is listed twice")]
    Twice {
        /// The name.
        tensor: String,
    },
    /// A tensor that cannot be made.
    #[error(transparent)]
    Random(#[from] RandomError),
    /// The model's config.json cannot be copied.
    #[error("{path}: cannot be read; name the config.json of the model")]
    Config {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The system refused to write.
    #[error("{path}: cannot be written")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

impl WriteError {
    fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + use<'_> {
        move |source| Self::Io { path: path.to_owned(), source }
    }
}

/// Writes the tensors listed, and a copy of `config`, into the folder `out`, which it makes.
///
/// # Errors
/// See [`WriteError`]. Files begun are removed; complete ones of an interrupted run are not, but
/// without an index nothing opens them.
pub fn write_random(
    out: &Path,
    config: &Path,
    model: &RandomModel,
    specs: impl IntoIterator<Item = TensorSpec>,
    options: &WriteOptions,
    progress: &dyn Progress,
) -> Result<Written, WriteError> {
    for name in [SINGLE_FILE, INDEX_FILE] {
        let file = out.join(name);
        if file.exists() {
            return Err(WriteError::Exists { file });
        }
    }
    let config = fs::read(config)
        .map_err(|source| WriteError::Config { path: config.to_owned(), source })?;
    let shards = plan(model, specs, options.shard_bytes)?;
    let data_bytes = shards.iter().map(|shard| shard.data_bytes).sum();
    fs::create_dir_all(out).map_err(WriteError::io(out))?;
    write_file(&out.join("config.json"), |file| Ok(file.write_all_at(&config, 0)?))?;
    let tally = Tally::new(progress, Stage::Write, data_bytes);
    let mut files = Vec::with_capacity(shards.len());
    let mut weight_map = BTreeMap::new();
    for (number, shard) in (1..).zip(&shards) {
        let name = match shards.len() {
            1 => SINGLE_FILE.to_owned(),
            count => format!("model-{number:05}-of-{count:05}.safetensors"),
        };
        let path = out.join(&name);
        write_file(&path, |file| shard.write(file, model, options.threads, &tally))?;
        for (spec, _) in &shard.tensors {
            weight_map.insert(spec.name.clone(), name.clone());
        }
        files.push(path);
    }
    if shards.len() > 1 {
        let index = json!({"metadata": {"total_size": data_bytes}, "weight_map": weight_map});
        let text = format!("{index:#}\n");
        write_file(&out.join(INDEX_FILE), |file| Ok(file.write_all_at(text.as_bytes(), 0)?))?;
    }
    Ok(Written { files, data_bytes })
}

/// The tensors of one file, in the order of their data, each with its offset from the data's start.
struct Shard {
    tensors: Vec<(TensorSpec, u64)>,
    data_bytes: u64,
}

/// Deals tensors to files in the order given, and checks each before anything is written.
fn plan(
    model: &RandomModel,
    specs: impl IntoIterator<Item = TensorSpec>,
    shard_bytes: u64,
) -> Result<Vec<Shard>, WriteError> {
    let mut names = BTreeSet::new();
    let mut groups: Vec<(Vec<TensorSpec>, u64)> = vec![(Vec::new(), 0)];
    for spec in specs {
        model.law(&spec)?;
        let bytes = spec.byte_len()?;
        if !names.insert(spec.name.clone()) {
            return Err(WriteError::Twice { tensor: spec.name });
        }
        match groups.last_mut() {
            Some((group, size))
                if group.is_empty() || size.saturating_add(bytes) <= shard_bytes =>
            {
                *size += bytes;
                group.push(spec);
            }
            _ => groups.push((vec![spec], bytes)),
        }
    }
    let shard = |(mut group, data_bytes): (Vec<TensorSpec>, u64)| {
        // Wide types first, as the format's own writer has it: every tensor then lies aligned.
        group.sort_by_key(|spec| std::cmp::Reverse(spec.dtype));
        let mut offset = 0;
        let place = |spec: TensorSpec| {
            let start = offset;
            offset += spec.byte_len()?;
            Ok((spec, start))
        };
        let tensors = group.into_iter().map(place).collect::<Result<_, RandomError>>()?;
        Ok(Shard { tensors, data_bytes })
    };
    groups.into_iter().map(shard).collect()
}

impl Shard {
    fn write(
        &self,
        file: &File,
        model: &RandomModel,
        threads: usize,
        tally: &Tally<'_>,
    ) -> Result<(), FileError> {
        let header = self.header(model)?;
        file.set_len(header.len() as u64 + self.data_bytes)?;
        file.write_all_at(&header, 0)?;
        let start = header.len() as u64;
        let jobs = self.tensors.iter().flat_map(|(spec, offset)| {
            pieces(model, spec).map(move |piece| (spec, start + offset, piece))
        });
        parallel::for_each(threads, jobs, |(spec, at, piece)| {
            let bytes = match spec.float()? {
                Float::F32 => write_piece::<f32>(file, at, model, spec, piece),
                Float::Bf16 => write_piece::<bf16>(file, at, model, spec, piece),
                Float::F16 => write_piece::<f16>(file, at, model, spec, piece),
            }?;
            tally.add(bytes);
            Ok(())
        })
    }

    /// The length and the JSON, padded with spaces.
    fn header(&self, model: &RandomModel) -> Result<Vec<u8>, FileError> {
        let entry = |(spec, offset): &(TensorSpec, u64)| {
            let start = usize::try_from(*offset).map_err(io::Error::other)?;
            let end = start + spec.byte_len()? as usize;
            let (dtype, shape) = (spec.dtype, spec.shape.clone());
            Ok((spec.name.clone(), TensorInfo { dtype, shape, data_offsets: (start, end) }))
        };
        let entries = self.tensors.iter().map(entry).collect::<Result<Vec<_>, FileError>>()?;
        // Readers in Python want to be told a framework; the second entry is for people.
        let notes = [
            ("format".to_owned(), "pt".to_owned()),
            ("random".to_owned(), format!("seed {}, profile {:?}", model.seed, model.profile)),
        ];
        let metadata =
            Metadata::new(Some(notes.into_iter().collect()), entries).map_err(io::Error::other)?;
        let mut json = serde_json::to_vec(&metadata).map_err(io::Error::other)?;
        json.resize(json.len().next_multiple_of(ALIGNMENT), b' ');
        let mut header = (json.len() as u64).to_le_bytes().to_vec();
        header.append(&mut json);
        Ok(header)
    }
}

/// Ranges of a tensor's elements, one a job; a tensor that is made whole is one.
fn pieces(model: &RandomModel, spec: &TensorSpec) -> impl Iterator<Item = Range<usize>> + use<> {
    let elements = spec.elements().unwrap_or(0);
    let step = if model.made_whole(spec) { elements.max(1) } else { CHUNK };
    (0..elements).step_by(step).map(move |start| start..elements.min(start + step))
}

fn write_piece<T: Element>(
    file: &File,
    tensor_at: u64,
    model: &RandomModel,
    spec: &TensorSpec,
    piece: Range<usize>,
) -> Result<u64, FileError> {
    let mut values = vec![T::default(); piece.len()];
    Fill::new(model, spec)?.fill(piece.start, &mut values);
    let bytes = values.as_bytes();
    file.write_all_at(bytes, tensor_at + (piece.start * size_of::<T>()) as u64)?;
    Ok(bytes.len() as u64)
}

/// What goes wrong within one file, whose name the caller adds.
#[derive(Debug)]
enum FileError {
    Random(RandomError),
    Io(io::Error),
}

impl From<io::Error> for FileError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<RandomError> for FileError {
    fn from(error: RandomError) -> Self {
        Self::Random(error)
    }
}

/// Writes a file under another name, brings it to the disk and gives it its own name.
fn write_file(
    path: &Path,
    write: impl FnOnce(&File) -> Result<(), FileError>,
) -> Result<(), WriteError> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let file = File::create(&partial).map_err(WriteError::io(&partial))?;
    let done = write(&file)
        .and_then(|()| Ok(file.sync_all()?))
        .and_then(|()| Ok(fs::rename(&partial, path)?));
    done.map_err(|error| {
        // The reason for the failure is worth more than one for not cleaning up after it.
        let _ = fs::remove_file(&partial);
        match error {
            FileError::Random(error) => error.into(),
            FileError::Io(source) => WriteError::Io { path: path.to_owned(), source },
        }
    })
}
