//! Where log lines go: standard error, human lines by default, JSON with `TOKENMILL_LOG_FORMAT=json`.
//! Levels come from `TOKENMILL_LOG` (the usual filter syntax); `info` when unset.

use tracing_subscriber::EnvFilter;

/// Installs the subscriber for this process.
///
/// # Errors
/// When `TOKENMILL_LOG` does not parse, or `TOKENMILL_LOG_FORMAT` is neither `text` nor `json`.
pub(crate) fn install() -> anyhow::Result<()> {
    let filter = match std::env::var("TOKENMILL_LOG") {
        Ok(spec) => EnvFilter::try_new(&spec)
            .map_err(|error| anyhow::anyhow!("TOKENMILL_LOG={spec}: {error}"))?,
        Err(_) => EnvFilter::new("info"),
    };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match std::env::var("TOKENMILL_LOG_FORMAT").as_deref() {
        Ok("json") => builder.json().init(),
        Ok("text") | Err(_) => builder.with_target(false).init(),
        Ok(other) => anyhow::bail!("TOKENMILL_LOG_FORMAT={other}: use text or json"),
    }
    Ok(())
}
