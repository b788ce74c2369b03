//! The open files that came with a reply, each with what it is.

use super::{Error, Result};
use crate::protocol::{Fd, FdKind};
use std::os::fd::{AsFd, OwnedFd};

/// An open file and what it is.
#[derive(Debug)]
pub struct File {
    /// What it is.
    pub kind: FdKind,
    /// A group's number, a device's address, or empty.
    pub name: String,
    /// The open file, close-on-exec.
    pub fd: OwnedFd,
}

/// The open files of a lease.
#[derive(Debug, Default)]
pub struct Files {
    list: Vec<File>,
}

impl Files {
    /// Puts names to what came: each entry of `listed` takes the fd with its index. Files that
    /// nothing lists are closed.
    pub(super) fn pair(method: &'static str, listed: &[Fd], came: Vec<OwnedFd>) -> Result<Self> {
        let count = came.len();
        let mut came: Vec<Option<OwnedFd>> = came.into_iter().map(Some).collect();
        let mut list = Vec::with_capacity(listed.len());
        for Fd { index, kind, name } in listed {
            let Some(slot) = came.get_mut(*index) else {
                let reason = format!("number {index} is listed, {count} came");
                return Err(Error::Fds { method, reason });
            };
            let Some(fd) = slot.take() else {
                return Err(Error::Fds { method, reason: format!("number {index} comes twice") });
            };
            list.push(File { kind: *kind, name: name.clone(), fd });
        }
        Ok(Self { list })
    }

    /// All of them, in the order of the reply.
    pub fn iter(&self) -> std::slice::Iter<'_, File> {
        self.list.iter()
    }

    /// The first of that kind; with a name, the one with that name.
    pub fn get(&self, kind: FdKind, name: Option<&str>) -> Option<&File> {
        self.list.iter().find(|file| is(file, kind, name))
    }

    /// Takes the first of that kind out; with a name, the one with that name.
    pub fn take(&mut self, kind: FdKind, name: Option<&str>) -> Option<File> {
        let at = self.list.iter().position(|file| is(file, kind, name))?;
        Some(self.list.remove(at))
    }

    /// Adds what a later reply brought. Of files that are there already the older one stays.
    pub(super) fn extend(&mut self, more: Files) {
        for file in more.list {
            if self.get(file.kind, Some(&file.name)).is_none() {
                self.list.push(file);
            }
        }
    }
}

impl<'a> IntoIterator for &'a Files {
    type Item = &'a File;
    type IntoIter = std::slice::Iter<'a, File>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl IntoIterator for Files {
    type Item = File;
    type IntoIter = std::vec::IntoIter<File>;

    fn into_iter(self) -> Self::IntoIter {
        self.list.into_iter()
    }
}

fn is(file: &File, kind: FdKind, name: Option<&str>) -> bool {
    file.kind == kind && name.is_none_or(|name| file.name == name)
}

/// A copy of an open file that a child process inherits: it is not close-on-exec. Drop it once the
/// child is started. Whatever else this process starts meanwhile inherits it as well, so a program
/// that starts children in several threads must not let another start one in between.
///
/// # Errors
/// EMFILE: too many open files.
pub fn inheritable(file: impl AsFd) -> Result<OwnedFd> {
    nix::unistd::dup(file).map_err(|errno| Error::System { call: "dup", errno })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fds(count: usize) -> Vec<OwnedFd> {
        (0..count).map(|_| std::fs::File::open("/dev/null").unwrap().into()).collect()
    }

    fn listed(indexes: &[usize]) -> Vec<Fd> {
        let fd = |&index| Fd { index, kind: FdKind::Device, name: format!("{index}") };
        indexes.iter().map(fd).collect()
    }

    #[test]
    fn each_file_gets_the_name_of_its_index() {
        let came = fds(3);
        let identity = |fd: &OwnedFd| std::os::fd::AsRawFd::as_raw_fd(fd);
        let raw: Vec<_> = came.iter().map(identity).collect();
        let files = Files::pair("m", &listed(&[2, 0]), came).unwrap();
        let got: Vec<_> = files.iter().map(|f| (f.name.as_str(), identity(&f.fd))).collect();
        assert_eq!(got, [("2", raw[2]), ("0", raw[0])]);
    }

    #[test]
    fn a_file_that_is_not_there_or_is_there_twice_is_an_error() {
        for (indexes, count) in [(&[0][..], 0), (&[0, 2], 2), (&[usize::MAX], 1), (&[1, 1], 2)] {
            let error = Files::pair("m", &listed(indexes), fds(count)).unwrap_err();
            assert!(matches!(error, Error::Fds { .. }), "{error}");
        }
    }

    #[test]
    fn files_that_nothing_lists_are_closed() {
        let (read_end, write_end) = nix::unistd::pipe().unwrap();
        let mut came = fds(1);
        came.push(read_end);
        let files = Files::pair("m", &listed(&[0]), came).unwrap();
        assert_eq!(nix::unistd::write(&write_end, b"x"), Err(nix::errno::Errno::EPIPE));
        assert_eq!(files.iter().count(), 1);
    }

    #[test]
    fn taken_files_are_gone_and_others_stay() {
        let mut files = Files::pair("m", &listed(&[0, 1]), fds(2)).unwrap();
        assert!(files.take(FdKind::Group, None).is_none());
        assert_eq!(files.take(FdKind::Device, Some("1")).unwrap().name, "1");
        assert!(files.get(FdKind::Device, Some("1")).is_none());
        assert!(files.get(FdKind::Device, None).is_some());
    }

    #[test]
    fn an_inheritable_copy_stays_open_over_exec() {
        let (read_end, _write_end) = std::io::pipe().unwrap();
        let copy = inheritable(&read_end).unwrap();
        let flags = nix::fcntl::fcntl(&copy, nix::fcntl::FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags & nix::libc::FD_CLOEXEC, 0);
    }
}
