//! Waiting for what another process does by itself.

use std::time::{Duration, Instant};

/// Waits for something that happens by itself, and says what if it does not.
#[track_caller]
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !done() {
        assert!(Instant::now() < deadline, "in two minutes it was not so: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
