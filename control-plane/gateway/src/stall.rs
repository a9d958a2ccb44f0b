//! A connection whose peer takes no bytes for too long fails.
//!
//! A client that stops reading fills its socket; the writer then waits, and everything behind it:
//! reply, generation, KV. Timing writes at the socket ends that for every kind of reply alike.
//! Reading is not timed here: idle connections and slow headers are the server's own timers.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use telemetry::Metrics;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

/// `S` with a limit on how long a write may make no progress.
pub(crate) struct StallGuard<S> {
    stream: S,
    /// Runs while a write waits.
    waiting: Option<Pin<Box<Sleep>>>,
    limit: Duration,
    metrics: Arc<Metrics>,
}

impl<S> StallGuard<S> {
    pub(crate) fn new(stream: S, limit: Duration, metrics: Arc<Metrics>) -> Self {
        Self { stream, waiting: None, limit, metrics }
    }

    /// Passes `result` on; pending for longer than the limit becomes an error.
    fn timed<T>(
        &mut self,
        cx: &mut Context<'_>,
        result: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if result.is_ready() {
            self.waiting = None;
            return result;
        }
        let limit = self.limit;
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(sleep(limit)));
        if waiting.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        self.waiting = None;
        self.metrics.stalled_clients.inc();
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client reads nothing")))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for StallGuard<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for StallGuard<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.timed(cx, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.timed(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_flush(cx);
        self.timed(cx, result)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.timed(cx, result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_reads_nothing_is_given_up_and_a_slow_one_is_not() {
        let metrics = Arc::new(Metrics::new("m", "1"));
        let limit = Duration::from_secs(30);
        let (near, mut far) = tokio::io::duplex(8);
        let mut near = StallGuard::new(near, limit, Arc::clone(&metrics));
        let slow = tokio::spawn(async move {
            let mut buf = [0; 8];
            for _ in 0..4 {
                sleep(limit - Duration::from_secs(1)).await;
                far.read_exact(&mut buf).await.expect("written");
            }
            far
        });
        near.write_all(&[1; 32]).await.expect("slow but alive");
        let _far = slow.await.expect("no panic");
        let error = near.write_all(&[1; 32]).await.expect_err("stalled");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(metrics.stalled_clients.get(), 1);
    }
}
