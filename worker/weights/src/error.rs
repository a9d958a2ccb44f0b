//! Why a checkpoint is refused. Each refusal names the file, the tensor and the bytes concerned,
//! and says what to do about it.

use safetensors::Dtype;
use std::io;
use std::ops::Range;
use std::path::PathBuf;

/// A checkpoint that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The folder holds neither a single file nor an index.
    #[error(
        "{dir}: no model.safetensors and no model.safetensors.index.json; name a folder that holds \
         a safetensors checkpoint, or fetch one with `tokenmill model fetch ORG/NAME`"
    )]
    NoWeights {
        /// The folder looked into.
        dir: PathBuf,
    },
    /// Both a single file and an index that does not name it.
    #[error(
        "{dir}: holds model.safetensors and a model.safetensors.index.json that does not name it; \
         remove the one that does not belong to this model"
    )]
    Ambiguous {
        /// The folder looked into.
        dir: PathBuf,
    },
    /// The index names a file that is not there.
    #[error(
        "{file}: missing, but model.safetensors.index.json places tensor `{tensor}` in it; fetch the \
         checkpoint again"
    )]
    NoFile {
        /// The file.
        file: PathBuf,
        /// A tensor that it should hold.
        tensor: String,
    },
    /// The system refused to open or map a file.
    #[error("{file}: cannot be opened")]
    Io {
        /// The file.
        file: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A file that is damaged or not what its header or index says.
    #[error("{file}: {defect}")]
    Damaged {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        defect: Defect,
    },
    /// The model asks for a tensor that the checkpoint lacks.
    #[error(
        "{dir}: no tensor `{tensor}`; the checkpoint is of another architecture than config.json \
         says, or incomplete"
    )]
    NoTensor {
        /// The checkpoint.
        dir: PathBuf,
        /// The tensor's name.
        tensor: String,
    },
    /// A tensor whose elements cannot be used where it is asked for.
    #[error("{file}: tensor `{tensor}` is {found:?}, but {wanted} is needed here")]
    WrongDtype {
        /// The file.
        file: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What the file says.
        found: Dtype,
        /// What could be used.
        wanted: &'static str,
    },
    /// FP8 codes that no block size says how to scale.
    #[error(
        "{file}: tensor `{tensor}` is FP8, which is read as matrices with one scale per block; \
         config.json gives no quantization_config.weight_block_size, or this is no matrix"
    )]
    NoBlockSize {
        /// The file.
        file: PathBuf,
        /// The tensor's name.
        tensor: String,
    },
    /// A tensor whose shape is not the one asked for.
    #[error(
        "{file}: tensor `{tensor}` has shape {found:?}, but config.json makes it {wanted:?}; weights \
         and config.json are not of the same model"
    )]
    WrongShape {
        /// The file.
        file: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What the file says.
        found: Vec<usize>,
        /// What was asked for.
        wanted: Vec<usize>,
    },
}

/// What is wrong with a file of a checkpoint. Offsets count from the start of the file.
#[derive(Debug, thiserror::Error)]
pub enum Defect {
    /// Too short to hold the header's length.
    #[error("{len} bytes long, too short for a safetensors file; {FETCH_AGAIN}")]
    NoHeader {
        /// The file's length.
        len: u64,
    },
    /// The first eight bytes give a length that the file or the format does not allow.
    #[error(
        "the header at offset 8 would be {header} bytes long, in a file of {len} bytes (limit \
         {limit}); it is cut short or not a safetensors file; {FETCH_AGAIN}"
    )]
    HeaderLength {
        /// Length by the first eight bytes.
        header: u64,
        /// The file's length.
        len: u64,
        /// The format's limit.
        limit: u64,
    },
    /// The header or the index is not the JSON it should be.
    #[error("the JSON at offset {at} is not a {what}: {reason}; {FETCH_AGAIN}")]
    Json {
        /// Where the JSON starts.
        at: u64,
        /// What it should be.
        what: &'static str,
        /// The parser's, with line and column.
        reason: serde_json::Error,
    },
    /// Shape and type do not multiply to the bytes set aside.
    #[error(
        "tensor `{tensor}` at bytes {}..{}: shape {shape:?} of {dtype:?} does not take {} bytes; \
         {FETCH_AGAIN}", bytes.start, bytes.end, bytes.end.saturating_sub(bytes.start)
    )]
    Extent {
        /// The tensor's name.
        tensor: String,
        /// Its type.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<usize>,
        /// Its place.
        bytes: Range<u64>,
    },
    /// A tensor reaches past the end: the file was cut.
    #[error(
        "tensor `{tensor}` at bytes {}..{} reaches past the end of the file at {len}: the file is \
         cut short; {FETCH_AGAIN}", bytes.start, bytes.end
    )]
    PastEnd {
        /// The tensor's name.
        tensor: String,
        /// Its place.
        bytes: Range<u64>,
        /// The file's length.
        len: u64,
    },
    /// Two tensors share bytes, or bytes belong to none.
    #[error(
        "tensor `{tensor}` starts at byte {found}, but the one before it ends at {expected}; tensors \
         must neither overlap nor leave gaps; {FETCH_AGAIN}"
    )]
    Layout {
        /// The tensor's name.
        tensor: String,
        /// Where the tensor before it ends.
        expected: u64,
        /// Where it starts.
        found: u64,
    },
    /// More bytes than tensors.
    #[error("the tensors end at byte {end}, but the file goes on to {len}; {FETCH_AGAIN}")]
    Trailing {
        /// End of the last tensor.
        end: u64,
        /// The file's length.
        len: u64,
    },
    /// A code or a scale that is no number.
    #[error("element {element} of tensor `{tensor}`, at offset {at}, is no number; {FETCH_AGAIN}")]
    NotANumber {
        /// The tensor's name.
        tensor: String,
        /// Which element, row-major.
        element: usize,
        /// Its place in the file.
        at: u64,
    },
    /// The index sends a tensor to something that is not a file beside it.
    #[error(
        "weight_map puts tensor `{tensor}` into {target:?}, which is not the plain name of a \
         .safetensors file in the same folder; do not use this checkpoint"
    )]
    Escape {
        /// The tensor's name.
        tensor: String,
        /// What weight_map says.
        target: String,
    },
    /// The index says that this file holds a tensor, and it does not.
    #[error("lacks tensor `{tensor}`, which model.safetensors.index.json places in it; {MIXED}")]
    Missing {
        /// The tensor's name.
        tensor: String,
    },
    /// The file holds a tensor that the index does not know.
    #[error(
        "holds tensor `{tensor}` at offset {at}, which model.safetensors.index.json does not name; \
         {MIXED}"
    )]
    Unlisted {
        /// The tensor's name.
        tensor: String,
        /// Where its data starts.
        at: u64,
    },
    /// Two files hold one tensor.
    #[error(
        "holds tensor `{tensor}` at offset {at}, which model.safetensors.index.json places in {home}; \
         {MIXED}"
    )]
    Duplicate {
        /// The tensor's name.
        tensor: String,
        /// Where its data starts.
        at: u64,
        /// The file that should hold it.
        home: String,
    },
}

const FETCH_AGAIN: &str = "fetch the file again";
const MIXED: &str = "the files are not of one revision: fetch all of them again";
