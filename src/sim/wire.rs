//! The messages that simulated system calls are made of, byte by byte as `docs/sim.md` has them.
//!
//! Every call is one message: on the fd it is made on, or on a control connection. It brings its
//! own reply socket, so that processes sharing one open file never take each other's answers.

use nix::errno::Errno;

/// The first four bytes of every message: `VSIM`.
pub(crate) const MAGIC: u32 = u32::from_ne_bytes(*b"VSIM");

/// The most bytes that a struct, a text or a buffer may have.
pub(crate) const MAX_BYTES: usize = 64 << 10;

/// The most fds that one call may bring, its reply socket not counted: MSI-X has 2048 vectors.
pub(crate) const MAX_CALL_FDS: usize = 2048;

/// How many of them go with the call itself; more of them wait in the reply socket, in messages of
/// one byte and up to 16 fds each.
pub(crate) const FDS_WITH_CALL: usize = crate::sys::fdpass::MAX_FDS - 1;

/// The longest message: header, slots, bytes and buffer.
pub(crate) const MAX_MESSAGE: usize = HEADER + 8 * MAX_CALL_FDS + 2 * MAX_BYTES;

const HEADER: usize = 40;
const REPLY_HEADER: usize = 24;
const NO_OFFSET: u32 = u32::MAX;

/// What a call does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Op {
    /// ioctl(2), on a simulated fd.
    Ioctl = 0,
    /// pread(2), on a simulated device.
    Pread = 1,
    /// pwrite(2), on a simulated device.
    Pwrite = 2,
    /// open(2) of a node under `/dev`, on a control connection; so are all that follow.
    Open = 16,
    /// Reads a file of sysfs.
    SysfsRead = 17,
    /// Lists a directory of sysfs.
    SysfsList = 18,
    /// Reads a symbolic link of sysfs.
    SysfsLink = 19,
    /// The number of an entry of sysfs.
    SysfsInode = 20,
    /// Writes a file of sysfs: its path, and in the buffer what is written.
    SysfsWrite = 21,
    /// Adds a fault, in JSON.
    AddFault = 32,
    /// Forgets all faults and lets go of the replies that they hold back.
    ClearFaults = 33,
    /// The counts, in JSON.
    Stats = 34,
    /// Binds a device to a driver: `BDF` or `BDF DRIVER`.
    SetDriver = 35,
}

impl Op {
    /// Whether it is made on a simulated open file, rather than on a control connection.
    pub(crate) fn is_on_file(self) -> bool {
        matches!(self, Op::Ioctl | Op::Pread | Op::Pwrite)
    }

    fn from_number(number: u32) -> Option<Self> {
        const ALL: [Op; 13] = [
            Op::Ioctl,
            Op::Pread,
            Op::Pwrite,
            Op::Open,
            Op::SysfsRead,
            Op::SysfsList,
            Op::SysfsLink,
            Op::SysfsInode,
            Op::SysfsWrite,
            Op::AddFault,
            Op::ClearFaults,
            Op::Stats,
            Op::SetDriver,
        ];
        ALL.into_iter().find(|op| *op as u32 == number)
    }
}

/// What the argument of an ioctl is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum ArgKind {
    #[default]
    Value = 0,
    Text = 1,
    Fd = 2,
    Struct = 3,
    BadPointer = 4,
}

impl ArgKind {
    fn from_number(number: u32) -> Option<Self> {
        use ArgKind::{BadPointer, Fd, Struct, Text, Value};
        [Value, Text, Fd, Struct, BadPointer].into_iter().find(|kind| *kind as u32 == number)
    }
}

/// A call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) op: Op,
    /// The ioctl's request number.
    pub(crate) number: u32,
    pub(crate) kind: ArgKind,
    /// The ioctl's argument where it is an integer, or the offset of a read or write.
    pub(crate) value: u64,
    /// Where the struct names open files, and whether there is one.
    pub(crate) slots: Vec<(u32, bool)>,
    /// The struct, the text, or what is to be written.
    pub(crate) bytes: Vec<u8>,
    /// A buffer that the struct points to: where the pointer is, and what is in it.
    pub(crate) out: Option<(u32, Vec<u8>)>,
    /// How many bytes are to be read.
    pub(crate) len: u32,
}

impl Request {
    pub(crate) fn new(op: Op) -> Self {
        Self {
            op,
            number: 0,
            kind: ArgKind::Value,
            value: 0,
            slots: Vec::new(),
            bytes: Vec::new(),
            out: None,
            len: 0,
        }
    }

    pub(crate) fn with_text(op: Op, text: &str) -> Self {
        Self { bytes: text.as_bytes().to_vec(), ..Self::new(op) }
    }

    /// How many fds come after the reply socket.
    pub(crate) fn fds(&self) -> usize {
        self.slots.iter().filter(|(_, present)| *present).count()
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let (out_offset, out) = match &self.out {
            Some((offset, bytes)) => (*offset, bytes.as_slice()),
            None => (NO_OFFSET, &[][..]),
        };
        let len = if self.out.is_some() { out.len() as u32 } else { self.len };
        let mut message = Vec::with_capacity(HEADER + self.bytes.len() + out.len());
        for field in [MAGIC, self.op as u32, self.number, self.kind as u32] {
            message.extend_from_slice(&field.to_ne_bytes());
        }
        message.extend_from_slice(&self.value.to_ne_bytes());
        for field in [self.bytes.len() as u32, self.slots.len() as u32, out_offset, len] {
            message.extend_from_slice(&field.to_ne_bytes());
        }
        for (offset, present) in &self.slots {
            message.extend_from_slice(&offset.to_ne_bytes());
            message.extend_from_slice(&u32::from(*present).to_ne_bytes());
        }
        message.extend_from_slice(&self.bytes);
        message.extend_from_slice(out);
        message
    }

    /// Reads a message of exactly this form; anything else is `None`.
    pub(crate) fn decode(message: &[u8]) -> Option<Self> {
        let mut reader = Reader(message);
        if reader.u32()? != MAGIC {
            return None;
        }
        let op = Op::from_number(reader.u32()?)?;
        let number = reader.u32()?;
        let kind = ArgKind::from_number(reader.u32()?)?;
        let value = reader.u64()?;
        let bytes_len = reader.u32()? as usize;
        let slots_len = reader.u32()? as usize;
        let out_offset = reader.u32()?;
        let len = reader.u32()?;
        if bytes_len > MAX_BYTES || slots_len > MAX_CALL_FDS || len as usize > MAX_BYTES {
            return None;
        }
        let mut slots = Vec::with_capacity(slots_len);
        for _ in 0..slots_len {
            slots.push((reader.u32()?, reader.u32()? != 0));
        }
        let bytes = reader.take(bytes_len)?.to_vec();
        let out = match out_offset {
            NO_OFFSET => None,
            offset => Some((offset, reader.take(len as usize)?.to_vec())),
        };
        reader.0.is_empty().then_some(Self { op, number, kind, value, slots, bytes, out, len })
    }
}

/// An answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Answer {
    /// 0, or the errno.
    pub(crate) errno: i32,
    /// The return value; the bytes written.
    pub(crate) value: i32,
    /// Whether an fd comes with it.
    pub(crate) has_fd: bool,
    /// The struct as the kernel left it, also after an error; or what was read.
    pub(crate) bytes: Vec<u8>,
    /// The buffer that the struct pointed to.
    pub(crate) out: Vec<u8>,
}

impl Answer {
    pub(crate) fn failed(errno: Errno) -> Self {
        Self { errno: errno as i32, ..Self::default() }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut message = Vec::with_capacity(REPLY_HEADER + self.bytes.len() + self.out.len());
        message.extend_from_slice(&MAGIC.to_ne_bytes());
        message.extend_from_slice(&self.errno.to_ne_bytes());
        message.extend_from_slice(&self.value.to_ne_bytes());
        for field in [u32::from(self.has_fd), self.bytes.len() as u32, self.out.len() as u32] {
            message.extend_from_slice(&field.to_ne_bytes());
        }
        message.extend_from_slice(&self.bytes);
        message.extend_from_slice(&self.out);
        message
    }

    pub(crate) fn decode(message: &[u8]) -> Option<Self> {
        let mut reader = Reader(message);
        if reader.u32()? != MAGIC {
            return None;
        }
        let (errno, value) = (reader.u32()? as i32, reader.u32()? as i32);
        let has_fd = reader.u32()? & 1 != 0;
        let (bytes_len, out_len) = (reader.u32()? as usize, reader.u32()? as usize);
        let bytes = reader.take(bytes_len)?.to_vec();
        let out = reader.take(out_len)?.to_vec();
        Some(Self { errno, value, has_fd, bytes, out })
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_ne_bytes(self.take(4)?.try_into().ok()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_ne_bytes(self.take(8)?.try_into().ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_call_reads_back_as_it_was_written() {
        let call = Request {
            number: 15211,
            kind: ArgKind::Struct,
            value: 1 << 40,
            slots: vec![(20, true), (24, false)],
            bytes: vec![1, 2, 3],
            out: Some((40, vec![9; 8])),
            len: 8,
            ..Request::new(Op::Ioctl)
        };
        assert_eq!(Request::decode(&call.encode()), Some(call));
        let answer = Answer { errno: 22, value: -1, has_fd: true, bytes: vec![5], out: vec![6, 7] };
        assert_eq!(Answer::decode(&answer.encode()), Some(answer));
    }

    proptest! {
        #[test]
        fn garbage_is_no_call(mut message in proptest::collection::vec(any::<u8>(), 0..200), magic: bool) {
            if magic && message.len() >= 4 {
                message[..4].copy_from_slice(b"VSIM");
            }
            if let Some(call) = Request::decode(&message) {
                prop_assert_eq!(Request::decode(&call.encode()), Some(call));
            }
        }
    }
}
