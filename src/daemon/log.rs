//! The log, on standard error. A healthy system writes one line as a lease begins and one as it
//! ends; what clients do wrong is for `debug`, what they are denied for `info`.

use clap::ValueEnum;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt;

/// How the log is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One line of text an event.
    Text,
    /// One JSON object a line.
    Json,
}

/// Starts logging. `RUST_LOG` may be one of error, warn, info, debug and trace.
pub(super) fn start(format: LogFormat) {
    let asked = std::env::var("RUST_LOG").ok().and_then(|level| level.parse().ok());
    let level: LevelFilter = asked.unwrap_or(LevelFilter::INFO);
    // A log that nobody reads any more must not end the daemon: complaining on the same standard
    // error would.
    let builder = fmt().with_max_level(level).with_writer(std::io::stderr).with_target(false);
    let builder = builder.log_internal_errors(false);
    // A second subscriber in one process (a test) stays without effect, which is fine.
    let _ = match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
}

/// Text from a peer, for a log line: escaped, and not longer than a line should be.
pub(super) fn excerpt(text: &str) -> String {
    const MOST: usize = 100;
    let cut: String = text.chars().take(MOST).collect();
    let more = if cut.len() < text.len() { "..." } else { "" };
    format!("{}{more}", cut.escape_debug())
}
