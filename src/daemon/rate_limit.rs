//! How often something may be logged, so that a peer's mistakes can't fill the log.

use std::time::{Duration, Instant};

/// At most so many in each [`RateLimit::PERIOD`]; the rest is counted.
#[derive(Debug)]
pub(super) struct RateLimit {
    burst: u32,
    since: Option<Instant>,
    passed: u32,
    held_back: u64,
}

impl RateLimit {
    pub(super) const PERIOD: Duration = Duration::from_secs(10);

    pub(super) const fn new(burst: u32) -> Self {
        Self { burst, since: None, passed: 0, held_back: 0 }
    }

    /// Whether one more may pass now; if so, how many were held back before it.
    pub(super) fn pass(&mut self, now: Instant) -> Option<u64> {
        let over = self.since.is_none_or(|since| now.duration_since(since) >= Self::PERIOD);
        if over {
            self.since = Some(now);
            self.passed = 0;
        }
        if self.passed == self.burst {
            self.held_back += 1;
            return None;
        }
        self.passed += 1;
        Some(std::mem::take(&mut self.held_back))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_the_rest_is_counted() {
        let (mut limit, start) = (RateLimit::new(20), Instant::now());
        for _ in 0..20 {
            assert_eq!(limit.pass(start), Some(0));
        }
        assert_eq!(limit.pass(start), None);
        assert_eq!(limit.pass(start), None);
        assert_eq!(limit.pass(start + RateLimit::PERIOD), Some(2));
        assert_eq!(limit.pass(start + RateLimit::PERIOD), Some(0));
    }
}
