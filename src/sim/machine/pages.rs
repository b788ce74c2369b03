//! Memory that an iommufd maps (`struct iopt_pages`): whose it is, and what of it is pinned.
//!
//! Copies of a mapping share it, so a page is pinned, and charged, once however many address spaces
//! have it. It is pinned while one of those has a page table.

use super::memlock::{Accounts, PAGE, Payer};
use super::{Caller, Mm};
use nix::errno::Errno;
use std::sync::Arc;

/// Where the memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// From this address of the process on.
    Process(u64),
    /// From this offset of a file on, which has so many bytes; `None` for a file that is no memory.
    File(u64, Option<u64>),
}

/// Memory that is mapped at least once.
#[derive(Debug)]
pub(super) struct Pages {
    source: Source,
    process: Arc<dyn Caller + Send + Sync>,
    mm: Mm,
    payer: Payer,
    /// How much the payer may have pinned, as the process last said.
    limit: u64,
    pub(super) writable: bool,
    /// How many areas have some of it.
    pub(super) areas: u32,
    /// First and last page of each area that is pinned.
    filled: Vec<(u64, u64)>,
}

impl Pages {
    pub(super) fn new(
        source: Source,
        writable: bool,
        per_process: bool,
        accounts: &Accounts,
        caller: &dyn Caller,
    ) -> Self {
        let mm = caller.mm();
        let payer = match per_process {
            _ if accounts.is_exempt(caller) => Payer::Nobody,
            true => Payer::Process(mm),
            false => Payer::User(caller.uid()),
        };
        let (process, limit) = (caller.keep(), accounts.limit(caller));
        Self { source, process, mm, payer, limit, writable, areas: 0, filled: Vec::new() }
    }

    /// The address that the kernel takes its alignment from.
    pub(super) fn hint(&self) -> u64 {
        match self.source {
            Source::Process(start) | Source::File(start, _) => start,
        }
    }

    pub(super) fn is_file(&self) -> bool {
        matches!(self.source, Source::File(..))
    }

    /// Pins what an area has of it, first and last page, and charges what was not pinned before.
    ///
    /// # Errors
    /// EFAULT no such memory, or its process is gone; EINVAL a file that is too short or no memory;
    /// ENOMEM over the limit.
    pub(super) fn fill(
        &mut self,
        accounts: &mut Accounts,
        (first, last): (u64, u64),
    ) -> Result<(), Errno> {
        // Its limit outlives the process.
        if self.is_alive() {
            self.limit = accounts.limit(&*self.process);
        }
        let mut charged = 0;
        for (first, last) in self.gaps(first, last) {
            let size = (last - first + 1) * PAGE;
            // Pages are pinned one after the other: what comes first, the end of the limit or of
            // the memory, says which error it is.
            let result = self.reachable(first * PAGE, size).and_then(|reachable| {
                accounts.charge(self.payer, self.limit, reachable)?;
                charged += reachable;
                if reachable < size { Err(Errno::EFAULT) } else { Ok(()) }
            });
            if let Err(errno) = result {
                accounts.uncharge(self.payer, charged);
                return Err(errno);
            }
        }
        self.filled.push((first, last));
        Ok(())
    }

    /// Unpins what an area had, as far as no other has it.
    pub(super) fn unfill(&mut self, accounts: &mut Accounts, area: (u64, u64)) {
        let before = self.pinned_bytes();
        if let Some(at) = self.filled.iter().position(|filled| *filled == area) {
            self.filled.swap_remove(at);
        }
        accounts.uncharge(self.payer, before - self.pinned_bytes());
    }

    /// Who would be charged how much if it were the caller's.
    pub(super) fn charge_of(&self, caller: &dyn Caller) -> (Payer, u64) {
        let payer = match self.payer {
            Payer::Nobody => Payer::Nobody,
            Payer::Process(_) => Payer::Process(caller.mm()),
            Payer::User(_) => Payer::User(caller.uid()),
        };
        (payer, self.pinned_bytes())
    }

    /// Makes it the caller's, who has been charged for it.
    pub(super) fn move_to(&mut self, accounts: &mut Accounts, payer: Payer, caller: &dyn Caller) {
        accounts.uncharge(self.payer, self.pinned_bytes());
        (self.payer, self.process, self.mm) = (payer, caller.keep(), caller.mm());
        self.limit = accounts.limit(caller);
    }

    fn is_alive(&self) -> bool {
        self.process.mm() == self.mm
    }

    /// How many of `size` bytes from `offset` on can be pinned.
    fn reachable(&self, offset: u64, size: u64) -> Result<u64, Errno> {
        match self.source {
            Source::Process(start) if self.is_alive() => {
                let bytes = self.process.accessible(start + offset, size, self.writable);
                Ok(bytes & !(PAGE - 1))
            }
            Source::Process(_) => Ok(0),
            // A file is asked for all of it at once.
            Source::File(start, Some(length)) if start + offset + (size - 1) < length => Ok(size),
            Source::File(..) => Err(Errno::EINVAL),
        }
    }

    /// What of a range of pages is not pinned, ascending.
    fn gaps(&self, first: u64, last: u64) -> Vec<(u64, u64)> {
        let mut gaps = Vec::new();
        let mut next = first;
        for (start, end) in merged(&self.filled) {
            if start > last || next > last {
                break;
            }
            if start > next {
                gaps.push((next, start - 1));
            }
            next = next.max(end + 1);
        }
        if next <= last {
            gaps.push((next, last));
        }
        gaps
    }

    pub(super) fn pinned_bytes(&self) -> u64 {
        merged(&self.filled).iter().map(|(first, last)| (last - first + 1) * PAGE).sum()
    }

    /// The bytes that somebody is charged for.
    #[cfg(test)]
    pub(super) fn charged_bytes(&self) -> u64 {
        if self.payer == Payer::Nobody { 0 } else { self.pinned_bytes() }
    }
}

#[cfg(test)]
impl Pages {
    /// What of it is pinned, area by area.
    pub(super) fn filled(&self) -> Vec<(u64, u64)> {
        let mut filled = self.filled.clone();
        filled.sort_unstable();
        filled
    }
}

/// Ranges, first and last, ascending, those that touch made one.
pub(super) fn merged(ranges: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut sorted = ranges.to_vec();
    sorted.sort_unstable();
    let mut merged: Vec<(u64, u64)> = Vec::new();
    for (first, last) in sorted {
        match merged.last_mut() {
            Some((_, end)) if end.checked_add(1).is_none_or(|next| first <= next) => {
                *end = last.max(*end);
            }
            _ => merged.push((first, last)),
        }
    }
    merged
}
