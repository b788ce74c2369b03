//! An ioctl as the machine sees it: a number, and an argument that stands for user memory.

use crate::kernel::parse::{u16_at, u32_at, u64_at};
use nix::errno::Errno;
use std::fmt::Debug;
use std::sync::Arc;

/// An open file of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(pub u64);

/// Something that an interrupt can be signalled to.
pub trait Event: Debug + Send {
    /// Signals it once. Must not block.
    fn signal(&self);
}

/// An open file that a call names.
#[derive(Clone, Debug)]
pub enum Named {
    /// One of the machine's own.
    File(FileId),
    /// An eventfd.
    Event(Arc<dyn Event + Sync>),
    /// Memory that can be mapped by its file, of so many bytes.
    Memory(u64),
    /// Open, but of no use to VFIO.
    Other,
}

/// The third argument of an ioctl.
#[derive(Debug)]
pub enum CallArg {
    /// An integer.
    Value(u64),
    /// A string, without its NUL.
    Text(Vec<u8>),
    /// A pointer to an fd number, `None` where nothing is open under it.
    File(Option<Named>),
    /// A pointer to a struct.
    Struct(UserStruct),
    /// A pointer to nowhere.
    BadPointer,
}

impl CallArg {
    /// The argument as an integer; a pointer is some large number.
    pub(crate) fn value(&self) -> u64 {
        match self {
            CallArg::Value(value) => *value,
            _ => 0x7fff_0000_0000,
        }
    }

    /// The struct it points to, of which the kernel is about to read the first part.
    pub(crate) fn user(&mut self) -> Result<&mut UserStruct, Errno> {
        match self {
            CallArg::Struct(user) => Ok(user),
            _ => Err(Errno::EFAULT),
        }
    }
}

/// A struct in the caller's memory, zeros after its end.
#[derive(Debug, Default)]
pub struct UserStruct {
    /// The bytes that the caller gave; the answer replaces them.
    pub bytes: Vec<u8>,
    /// Open files that the struct names, by offset.
    pub fds: Vec<(u32, Option<Named>)>,
    /// A buffer that the struct points to, such as a dirty bitmap or a list of ranges.
    pub out: Option<Vec<u8>>,
}

impl UserStruct {
    /// A struct without fds.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, ..Self::default() }
    }

    /// Its first field: `argsz`, or `size` in iommufd's.
    pub(crate) fn argsz(&self) -> usize {
        self.u32(0) as usize
    }

    pub(crate) fn u16(&self, offset: usize) -> u16 {
        u16_at(&self.bytes, offset)
    }

    pub(crate) fn u32(&self, offset: usize) -> u32 {
        u32_at(&self.bytes, offset)
    }

    pub(crate) fn u64(&self, offset: usize) -> u64 {
        u64_at(&self.bytes, offset)
    }

    pub(crate) fn byte(&self, offset: usize) -> u8 {
        self.bytes.get(offset).copied().unwrap_or(0)
    }

    pub(crate) fn set_u32(&mut self, offset: usize, value: u32) {
        self.copy_out(offset, &value.to_ne_bytes());
    }

    pub(crate) fn set_u64(&mut self, offset: usize, value: u64) {
        self.copy_out(offset, &value.to_ne_bytes());
    }

    /// Writes bytes; what falls behind the caller's own is lost.
    pub(crate) fn copy_out(&mut self, offset: usize, value: &[u8]) {
        for (at, byte) in (offset..).zip(value) {
            if let Some(place) = self.bytes.get_mut(at) {
                *place = *byte;
            }
        }
    }

    /// The open file that the fd number at `offset` names.
    ///
    /// # Errors
    /// EBADF: nothing is open under it.
    pub(crate) fn fd(&self, offset: usize) -> Result<Option<Named>, Errno> {
        let slot = self.fds.iter().find(|(at, _)| *at as usize == offset);
        match slot {
            Some((_, Some(named))) => Ok(Some(named.clone())),
            Some((_, None)) => Ok(None),
            None if (self.u32(offset) as i32) < 0 => Ok(None),
            None => Err(Errno::EBADF),
        }
    }
}

/// What a successful ioctl gives back.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// The return value.
    pub value: i32,
    /// A new open file, to be returned as an fd.
    pub file: Option<FileId>,
}

impl Done {
    pub(crate) fn value(value: i32) -> Self {
        Self { value, file: None }
    }
}
