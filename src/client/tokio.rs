//! The client for tokio programs.
