//! Which files only root and this process's user can have a hand in.

use nix::unistd::geteuid;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;

/// Group and others may write.
const SHARED: u32 = 0o022;
const STICKY: u32 = 0o1000;

/// Whether it belongs to root or to us.
pub(super) fn is_owned(file: &Metadata) -> bool {
    file.uid() == 0 || file.uid() == geteuid().as_raw()
}

/// Whether nobody but root and us can change what is in it.
pub(super) fn is_file_safe(file: &Metadata) -> bool {
    is_owned(file) && file.mode() & SHARED == 0
}

/// Whether nobody but root and us can replace our files in it; a sticky one keeps them ours.
pub(super) fn is_directory_safe(directory: &Metadata) -> bool {
    is_owned(directory) && (directory.mode() & SHARED == 0 || directory.mode() & STICKY != 0)
}
