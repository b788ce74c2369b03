//! One ioctl as a value, so that it can be made on a real fd or sent to a simulated one.

use super::Request;
use std::ffi::CStr;
use std::os::fd::{BorrowedFd, OwnedFd};

/// An ioctl: its request and its argument.
#[derive(Debug)]
pub struct Ioctl<'a> {
    /// Which request.
    pub request: Request,
    /// What the third argument of ioctl(2) is.
    pub arg: Arg<'a>,
}

/// The third argument of ioctl(2).
#[derive(Debug)]
pub enum Arg<'a> {
    /// An integer passed by value; 0 where the request takes nothing.
    Value(u64),
    /// A pointer to a NUL-terminated string (`VFIO_GROUP_GET_DEVICE_FD`).
    Text(&'a CStr),
    /// A pointer to an `int` that names an open file (`VFIO_GROUP_SET_CONTAINER`).
    Fd(BorrowedFd<'a>),
    /// A pointer to a struct whose first field is its length: `argsz`, or `size` in iommufd's.
    Struct {
        /// The struct, in the machine's own byte order. `argsz` in it may be smaller than the
        /// buffer, never larger. The kernel's answer replaces it.
        bytes: &'a mut [u8],
        /// Open files that the struct names: their numbers are written into it.
        fds: &'a [FdSlot<'a>],
        /// A second buffer that the struct points to, and where in the struct that pointer is
        /// (`vfio_bitmap.data`, `iommu_ioas_iova_ranges.allowed_iovas`). The kernel may read it,
        /// write it, or both.
        out: Option<(usize, &'a mut [u8])>,
    },
    /// An address that is mapped nowhere: what the kernel answers with EFAULT.
    BadPointer,
}

/// An open file named inside a struct by an `i32` at `offset`.
#[derive(Clone, Copy, Debug)]
pub struct FdSlot<'a> {
    /// Where in the struct the number goes, in bytes.
    pub offset: usize,
    /// The open file; -1 is written where there is none.
    pub fd: Option<BorrowedFd<'a>>,
}

/// What a successful ioctl gives back.
#[derive(Debug, Default)]
pub struct Reply {
    /// The return value, 0 or more; 0 where it was an fd.
    pub value: i32,
    /// The open file that the request made, close-on-exec, owned by the caller.
    pub fd: Option<OwnedFd>,
}
