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
pub(crate) fn start(format: LogFormat) {
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

/// Text from a peer, for a log line: not longer than a line should be. What is no letter in it is
/// escaped by both formats as they write it.
pub(super) fn excerpt(text: &str) -> String {
    const MOST: usize = 100;
    let cut: String = text.chars().take(MOST).collect();
    let more = if cut.len() < text.len() { "..." } else { "" };
    format!("{cut}{more}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_a_peer_says_is_escaped_once_in_both_formats() {
        for json in [false, true] {
            let lines = Lines::default();
            let writer = lines.clone();
            let builder = fmt().with_ansi(false).with_writer(move || writer.clone());
            let log = || {
                let reason = excerpt("tenant \"a\"\nINFO all is well\x1b[2J");
                tracing::info!(reason, "denied");
            };
            if json {
                tracing::subscriber::with_default(builder.json().flatten_event(true).finish(), log);
            } else {
                tracing::subscriber::with_default(builder.finish(), log);
            }
            let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
            assert!(text.contains(r#"tenant \"a\"\nINFO all"#), "{text}");
            assert!(text.lines().count() == 1 && !text.contains('\x1b'), "{text}");
        }
    }
}
