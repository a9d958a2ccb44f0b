//! A file mapped into memory, read-only: the workspace's one `unsafe` outside of the kernels.
//!
//! It interprets nothing. The same bytes can be read into other memory, which is the way for whoever
//! wants each once: large reads keep a disk busier than page faults. Invariant: the bytes live as long
//! as the `Arc` that was handed out.

use memmap2::MmapOptions;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The bytes of one file, paged in on use and shared with the page cache.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    file: File,
    map: memmap2::Mmap,
}

impl MappedFile {
    /// Maps the whole of a regular file.
    ///
    /// Stated limit: a process that *truncates* the file while it is mapped makes a later read
    /// raise SIGBUS, and one that overwrites it in place changes the weights. Downloads and
    /// `write` replace files by renaming, which does neither.
    ///
    /// # Errors
    /// What opening and mapping return; `InvalidInput` for anything but a regular file.
    pub fn open(path: &Path) -> io::Result<Arc<Self>> {
        let file = File::open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        // SAFETY: the file is opened read-only and mapped private and read-only, so nothing in this
        // process can write through the map or through the file descriptor.
        // The map's length is the file's length at this moment and every access is bounds-checked
        // against it. Changes by other processes are the limit stated above: they cannot be
        // excluded on any file system, and no decision about memory safety (a length, an offset)
        // is read from the map after the checks of `header` have copied it out.
        let map = unsafe { MmapOptions::new().map_copy_read_only(&file)? };
        Ok(Arc::new(Self { path: path.to_owned(), file, map }))
    }

    /// The file's bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Reads the bytes from `offset` on into `to`, past the map; from any thread.
    ///
    /// # Errors
    /// The system's, and `UnexpectedEof` where the file has become shorter.
    pub fn read(&self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(to, offset)
    }

    /// Where the file was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}
