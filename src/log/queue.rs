//! Lines that the pipe has no room for: a bounded queue, with a reserve for the lines that say who had
//! which device.

use std::collections::VecDeque;

/// Bytes of waiting lines that say when a lease begins and ends: some 30,000 of them.
pub(super) const LEASE_ROOM: usize = 8 << 20;

/// Bytes of all other waiting lines.
pub(super) const OTHER_ROOM: usize = 256 << 10;

/// What a waiting line takes up beside its text.
const OVERHEAD: usize = 64;

/// Which room a line waits in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A lease begins or ends.
    Lease,
    /// Everything else.
    Other,
}

/// Lines in the order in which they came, and how many found no room.
#[derive(Debug, Default)]
pub(super) struct Queue {
    lines: VecDeque<(Kind, Box<[u8]>)>,
    lease_bytes: usize,
    other_bytes: usize,
    dropped: Dropped,
}

/// Lines that nobody will read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Dropped {
    pub(super) leases: u64,
    pub(super) others: u64,
}

impl Queue {
    pub(super) fn push(&mut self, kind: Kind, line: &[u8]) {
        let size = line.len() + OVERHEAD;
        let (bytes, most, dropped) = match kind {
            Kind::Lease => (&mut self.lease_bytes, LEASE_ROOM, &mut self.dropped.leases),
            Kind::Other => (&mut self.other_bytes, OTHER_ROOM, &mut self.dropped.others),
        };
        if *bytes + size > most {
            *dropped += 1;
            return;
        }
        *bytes += size;
        self.lines.push_back((kind, line.into()));
    }

    /// Has the lines written, the oldest first, until one is not. False where that happened.
    pub(super) fn drain(&mut self, mut write: impl FnMut(&[u8]) -> bool) -> bool {
        while let Some((kind, line)) = self.lines.pop_front() {
            if !write(&line) {
                self.lines.push_front((kind, line));
                return false;
            }
            let bytes = match kind {
                Kind::Lease => &mut self.lease_bytes,
                Kind::Other => &mut self.other_bytes,
            };
            *bytes -= line.len() + OVERHEAD;
        }
        true
    }

    /// What was dropped since this was last asked, once there is room to say so. Half of the room has
    /// to be free: told at once, each line that finds room would bring one more of these with it.
    pub(super) fn take_dropped(&mut self) -> Option<Dropped> {
        let has_room = self.other_bytes <= OTHER_ROOM / 2;
        (has_room && self.dropped != Dropped::default()).then(|| std::mem::take(&mut self.dropped))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drained(queue: &mut Queue) -> Vec<Box<[u8]>> {
        let mut lines = Vec::new();
        assert!(queue.drain(|line| {
            lines.push(line.into());
            true
        }));
        lines
    }

    #[test]
    fn lines_of_leases_have_room_when_others_have_none() {
        let mut queue = Queue::default();
        for _ in 0..10_000 {
            queue.push(Kind::Other, &[b'x'; 100]);
        }
        for number in 0..20_000_u32 {
            queue.push(Kind::Lease, &[&number.to_le_bytes()[..], &[b'x'; 200]].concat());
        }
        assert_eq!(queue.take_dropped(), None, "there is no room to say so");
        let lines = drained(&mut queue);
        let leases: Vec<_> = lines.iter().filter(|line| line.len() > 200).collect();
        assert_eq!(leases.len(), 20_000);
        let in_order = leases.iter().zip(0_u32..).all(|(line, at)| line[..4] == at.to_le_bytes());
        assert!(in_order);
        let others = 10_000 - (lines.len() - leases.len()) as u64;
        assert!(others > 0);
        assert_eq!(queue.take_dropped(), Some(Dropped { leases: 0, others }));
        assert_eq!(queue.take_dropped(), None);
        assert_eq!((queue.lease_bytes, queue.other_bytes), (0, 0));
    }

    #[test]
    fn the_reserve_has_an_end_and_what_is_over_it_is_counted() {
        let mut queue = Queue::default();
        for _ in 0..LEASE_ROOM / 1000 {
            queue.push(Kind::Lease, &[b'x'; 2000]);
        }
        let kept = queue.lines.len();
        let leases = (LEASE_ROOM / 1000 - kept) as u64;
        assert!(leases > 0 && kept * (2000 + OVERHEAD) <= LEASE_ROOM);
        assert_eq!(queue.take_dropped(), Some(Dropped { leases, others: 0 }));
    }

    #[test]
    fn what_is_not_written_stays_at_the_head() {
        let mut queue = Queue::default();
        for line in [b"1", b"2", b"3"] {
            queue.push(Kind::Other, line);
        }
        let mut writes = 0;
        assert!(!queue.drain(|_| {
            writes += 1;
            writes < 2
        }));
        let left: Vec<Box<[u8]>> = vec![b"2".as_slice().into(), b"3".as_slice().into()];
        assert_eq!(drained(&mut queue), left);
    }
}
