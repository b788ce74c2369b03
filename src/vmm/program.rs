//! Looking for a program before anything is acquired for it.

use super::{Error, Result};
use nix::errno::Errno;
use nix::unistd::{AccessFlags, access};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// Where execvp(3) would find a program, as far as that can be told without running it.
///
/// # Errors
/// [`Error::Program`] with ENOENT there is none, EACCES it is there and can't be executed.
pub fn find(program: &OsStr) -> Result<PathBuf> {
    let failed = |errno| Error::Program { program: program.into(), errno };
    if program.is_empty() {
        return Err(failed(Errno::ENOENT));
    }
    if Path::new(program).components().count() > 1 || program.as_encoded_bytes().contains(&b'/') {
        return check(Path::new(program)).map(|()| program.into()).map_err(failed);
    }
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/bin:/usr/bin".into());
    let mut worst = Errno::ENOENT;
    for directory in std::env::split_paths(&path) {
        let candidate = directory.join(program);
        match check(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(Errno::EACCES) => worst = Errno::EACCES,
            Err(_) => {}
        }
    }
    Err(failed(worst))
}

fn check(path: &Path) -> std::result::Result<(), Errno> {
    // A directory of PATH that can't be searched has no such program in it, as for shells.
    let found = nix::sys::stat::stat(path).map_err(|_| Errno::ENOENT)?;
    if found.st_mode & nix::libc::S_IFMT != nix::libc::S_IFREG {
        return Err(Errno::EACCES);
    }
    access(path, AccessFlags::X_OK)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errno(program: &str) -> Option<Errno> {
        match find(program.as_ref()) {
            Ok(_) => None,
            Err(Error::Program { errno, .. }) => Some(errno),
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn programs_are_found_as_a_shell_finds_them() {
        assert_eq!(errno("sh"), None);
        assert_eq!(errno("/bin/sh"), None);
        for missing in ["no-such-program-anywhere", "/no/such/program", ""] {
            assert_eq!(errno(missing), Some(Errno::ENOENT), "{missing}");
        }
        assert_eq!(errno("/"), Some(Errno::EACCES));
        assert_eq!(errno("/etc/passwd"), Some(Errno::EACCES));
    }
}
