//! One file on its way into the cache: taken up where it broke, counted, digested, then named.
//!
//! Invariant: a blob gets its name only with the listed number of bytes and, where the hub states
//! one, the listed SHA-256.

use super::HubError;
use super::cache::Cache;
use super::client::{Client, RemoteFile};
use sha2::{Digest, Sha256};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::path::Path;
use std::thread;
use ureq::http::{Response, StatusCode, header};
use ureq::{Body, Error};

/// Breaks in a row without a byte won before the transfer is given up.
const MAX_BREAKS: u32 = 5;
/// Bytes read at once.
const BUFFER: usize = 1 << 20;

/// Puts a file of a commit into its snapshot, fetching what is missing. `report` hears of each byte
/// once, whether it was there or has come.
pub(super) fn into_snapshot(
    client: &Client<'_>,
    cache: &Cache,
    commit: &str,
    file: &RemoteFile,
    report: &dyn Fn(u64),
) -> Result<(), HubError> {
    let _lock = cache.lock(&file.blob)?;
    let blob = cache.blob(&file.blob);
    if fs::metadata(&blob).is_ok_and(|known| known.len() == file.size) {
        report(file.size);
    } else {
        let partial = cache.incomplete(&file.blob);
        fetch(client, commit, file, &partial, report)?;
        fs::rename(&partial, &blob).map_err(HubError::io(&blob))?;
    }
    cache.link(commit, &file.name, &file.blob)
}

fn fetch(
    client: &Client<'_>,
    commit: &str,
    file: &RemoteFile,
    partial: &Path,
    report: &dyn Fn(u64),
) -> Result<(), HubError> {
    let mut transfer = Transfer::open(file, partial, report)?;
    let mut breaks = 0;
    while transfer.done < file.size {
        let before = transfer.done;
        let answer = client.file(commit, &file.name, transfer.done)?;
        let broken = match answer {
            Ok(response) => transfer.take(response)?,
            Err(error) => Some(error),
        };
        let Some(error) = broken else { continue };
        breaks = if transfer.done > before { 1 } else { breaks + 1 };
        if breaks >= MAX_BREAKS {
            return Err(HubError::Broken {
                file: file.name.clone(),
                done: transfer.done,
                size: file.size,
                source: Box::new(error),
            });
        }
        thread::sleep(client.retry_pause() * (1 << (breaks - 1)));
    }
    transfer.finish()
}

/// A file that is coming.
struct Transfer<'a> {
    file: &'a RemoteFile,
    path: &'a Path,
    disk: File,
    digest: Sha256,
    /// Bytes on the disk, all of them in the digest.
    done: u64,
    /// Bytes told of; more than `done` after a start from the beginning.
    told: u64,
    report: &'a dyn Fn(u64),
}

impl<'a> Transfer<'a> {
    /// Takes up what an earlier call has left.
    fn open(
        file: &'a RemoteFile,
        path: &'a Path,
        report: &'a dyn Fn(u64),
    ) -> Result<Self, HubError> {
        let disk = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(HubError::io(path))?;
        let mut transfer =
            Self { file, path, disk, digest: Sha256::new(), done: 0, told: 0, report };
        let left = transfer.disk.metadata().map_err(HubError::io(path))?.len();
        if left > file.size {
            transfer.restart()?;
            return Ok(transfer);
        }
        let mut buffer = vec![0; BUFFER];
        while transfer.done < left {
            let read = transfer.disk.read(&mut buffer).map_err(HubError::io(path))?;
            if read == 0 {
                break;
            }
            transfer.count(&buffer[..read]);
        }
        Ok(transfer)
    }

    /// Takes an answer's bytes. Gives the error that ended it, if it did not end of itself.
    fn take(&mut self, response: Response<Body>) -> Result<Option<Error>, HubError> {
        if let Some(sent) = whole_length(&response)
            && sent != self.file.size
        {
            let (file, listed) = (self.file.name.clone(), self.file.size);
            return Err(HubError::Size { file, listed, sent });
        }
        match response.status() {
            StatusCode::PARTIAL_CONTENT if starts_at(&response) == Some(self.done) => {}
            // The range was ignored or not understood: what comes is the file from its beginning.
            StatusCode::OK => self.restart()?,
            _ => {
                self.restart()?;
                let unusable = io::Error::other("the hub sends another range than was asked for");
                return Ok(Some(Error::Io(unusable)));
            }
        }
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0; BUFFER];
        loop {
            let read = match body.read(&mut buffer) {
                Ok(0) if self.done < self.file.size => {
                    return Ok(Some(Error::Io(io::ErrorKind::UnexpectedEof.into())));
                }
                Ok(0) => return Ok(None),
                Ok(read) => read,
                Err(error) => return Ok(Some(Error::Io(error))),
            };
            let sent = self.done + read as u64;
            if sent > self.file.size {
                self.restart()?;
                let (file, listed) = (self.file.name.clone(), self.file.size);
                return Err(HubError::Size { file, listed, sent });
            }
            self.disk.write_all(&buffer[..read]).map_err(HubError::io(self.path))?;
            self.count(&buffer[..read]);
        }
    }

    fn count(&mut self, bytes: &[u8]) {
        self.digest.update(bytes);
        self.done += bytes.len() as u64;
        if self.done > self.told {
            (self.report)(self.done - self.told);
            self.told = self.done;
        }
    }

    fn restart(&mut self) -> Result<(), HubError> {
        self.disk.set_len(0).map_err(HubError::io(self.path))?;
        self.disk.rewind().map_err(HubError::io(self.path))?;
        self.digest = Sha256::new();
        self.done = 0;
        Ok(())
    }

    fn finish(mut self) -> Result<(), HubError> {
        let sent = hex(&std::mem::take(&mut self.digest).finalize());
        match &self.file.sha256 {
            Some(listed) if *listed != sent => {
                self.restart()?;
                let (file, listed) = (self.file.name.clone(), listed.clone());
                Err(HubError::Digest { file, listed, sent })
            }
            _ => self.disk.sync_all().map_err(HubError::io(self.path)),
        }
    }
}

/// Length of the whole file by the answer's headers: the part behind the slash of a partial answer,
/// the length of the body of a whole one.
fn whole_length(response: &Response<Body>) -> Option<u64> {
    let text = |name| response.headers().get(name)?.to_str().ok();
    match response.status() {
        StatusCode::OK => text(header::CONTENT_LENGTH)?.parse().ok(),
        _ => text(header::CONTENT_RANGE)?.rsplit('/').next()?.parse().ok(),
    }
}

/// The first byte of a partial answer (RFC 9110, section 14.4).
fn starts_at(response: &Response<Body>) -> Option<u64> {
    let range = response.headers().get(header::CONTENT_RANGE)?.to_str().ok()?;
    range.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
