//! How many more files this process can open. Some of them are kept for ending what there is: leases
//! are taken back and connections closed with files of their own.

use std::cell::Cell;

/// The part of all files that new connections and leases leave alone, and the most that this comes to.
const RESERVED_PART: usize = 16;
const MOST_RESERVED: usize = 1024;

/// How many questions may be answered from one count, where a count takes long.
const ANSWERS_A_COUNT: usize = 64;

/// The open files of this process, and its limit. Lives on the event loop.
#[derive(Debug)]
pub(super) struct OpenFiles {
    limit: usize,
    /// The last count and how many answers it has served, where the kernel does not say it at once.
    counted: Cell<(usize, usize)>,
}

impl OpenFiles {
    pub(super) fn new(limit: u64) -> Self {
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        Self { limit, counted: Cell::new((0, ANSWERS_A_COUNT)) }
    }

    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// Whether there are too few for a new connection or lease.
    pub(super) fn are_short(&self) -> bool {
        self.are_fewer_than(self.reserved())
    }

    /// Whether there are too few even to take a connection in and refuse it.
    pub(super) fn are_out(&self) -> bool {
        self.are_fewer_than(self.reserved() / 2)
    }

    fn reserved(&self) -> usize {
        (self.limit / RESERVED_PART).min(MOST_RESERVED)
    }

    fn are_fewer_than(&self, wanted: usize) -> bool {
        self.open().saturating_add(wanted) > self.limit
    }

    fn open(&self) -> usize {
        // The directory's size is the number of open files from Linux 6.2 on; before that it is 0.
        let told = std::fs::metadata("/proc/self/fd").map_or(0, |found| found.len());
        if told > 0 {
            return usize::try_from(told).unwrap_or(usize::MAX);
        }
        let (mut count, mut answers) = self.counted.get();
        answers += 1;
        if answers >= ANSWERS_A_COUNT || count + answers + self.reserved() > self.limit {
            // It takes an open file to count them.
            count = std::fs::read_dir("/proc/self/fd").map_or(self.limit, Iterator::count);
            answers = 0;
        }
        self.counted.set((count, answers));
        count + answers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_short_before_they_are_out() {
        // Other tests open files beside this one: with many, theirs don't matter.
        let held: Vec<_> = (0..600).map(|_| std::fs::File::open("/dev/null").unwrap()).collect();
        let open = OpenFiles::new(u64::MAX).open() as u64;
        assert!(open >= held.len() as u64);
        let limited = |limit| OpenFiles::new(limit);
        assert!(!limited(open * 2).are_short());
        let short = limited(open + open * 3 / 64);
        assert!(short.are_short() && !short.are_out());
        assert!(limited(open + open / 64).are_out());
    }
}
