//! Standard output, whose reader may leave before a command is done: `tokenmill bench kernels --list | head`.
//!
//! What is told is written at once. Invariant: a reader that left is no failure. A command has nothing
//! more to do then and ends quietly, behind everything that it began; a server goes on. What measures or
//! checks ends as [`CutShort`]: figures that nobody has are no success.

use anyhow::{Context, Error, Result};
use std::fmt;
use std::io::{ErrorKind, Write, stdout};

/// Whoever read standard output has left.
#[derive(Debug, thiserror::Error)]
#[error("nobody reads standard output")]
pub(crate) struct Closed;

/// What was to be told in full was not.
#[derive(Debug, thiserror::Error)]
#[error("nobody reads standard output any more; {0}")]
pub(crate) struct CutShort(&'static str);

impl CutShort {
    /// As a shell sees a program that a closed pipe ended.
    pub(crate) const STATUS: u8 = 128 + 13;
}

/// Writes text as it is.
///
/// # Errors
/// [`Closed`], and whatever else keeps text from being written.
pub(crate) fn write(text: fmt::Arguments<'_>) -> Result<()> {
    let mut out = stdout().lock();
    match out.write_fmt(text).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Err(Error::new(Closed)),
        written => written.context("write to standard output"),
    }
}

/// The outcome of what goes on where nobody reads.
pub(crate) fn unless_closed(outcome: Result<()>) -> Result<()> {
    outcome.or_else(|error| if error.is::<Closed>() { Ok(()) } else { Err(error) })
}

/// The outcome of what is nothing unless all of it is told; `rest` says what becomes of the others.
pub(crate) fn in_full(outcome: Result<()>, rest: &'static str) -> Result<()> {
    outcome.map_err(|error| if error.is::<Closed>() { CutShort(rest).into() } else { error })
}

/// Tells a line, as `println!` does, as a result.
macro_rules! say {
    ($($text:tt)*) => { $crate::out::write(format_args!("{}\n", format_args!($($text)*))) };
}

/// The same without the line's end.
macro_rules! say_part {
    ($($text:tt)*) => { $crate::out::write(format_args!($($text)*)) };
}

pub(crate) use {say, say_part};
