//! The file in which the broker keeps who was given devices by their own nodes, for the daemon that is
//! started after this one.

use super::file_mode;
use super::listen::beside;
use super::start_error::StartError;
use crate::broker::{Given, Record};
use crate::kernel;
use nix::errno::Errno;
use nix::libc::{O_NOFOLLOW, O_NONBLOCK};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use tracing::info;

/// What this daemon writes and understands.
const VERSION: u32 = 1;

/// A new number with each start of the kernel.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// What is in the file.
#[derive(Serialize, Deserialize)]
struct Content<G> {
    #[serde(flatten)]
    header: Header,
    given: G,
}

/// What has to be known before the rest means anything.
#[derive(Serialize, Deserialize)]
struct Header {
    version: u32,
    /// The kernel that ran then: with it all files were closed, and its numbers mean other things now.
    boot: String,
}

/// The file, beside the socket.
#[derive(Debug)]
pub(super) struct RecordFile {
    path: PathBuf,
    boot: String,
}

impl RecordFile {
    /// The one in the directory of `socket`, by its name.
    pub(super) fn of(socket: &Path) -> Result<Self, StartError> {
        let boot = std::fs::read_to_string(BOOT_ID).map_err(|source| StartError::SetUp {
            what: "the record of who was given devices (/proc/sys/kernel/random/boot_id)",
            source,
        })?;
        Ok(Self { path: beside(socket, ".given"), boot: boot.trim().to_owned() })
    }

    /// What the last daemon left. To be called when no other daemon can be writing to it.
    pub(super) fn read(&self) -> Result<Vec<Given>, StartError> {
        let unreadable = self.unusable();
        let text = match self.text() {
            Ok(Some(text)) => text,
            Ok(None) => return Ok(Vec::new()),
            Err(error) => return Err(unreadable(error.to_string())),
        };
        let parsed = |error: serde_json::Error| unreadable(error.to_string());
        let Header { version, boot } = serde_json::from_str(&text).map_err(parsed)?;
        if boot != self.boot {
            info!(path = %self.path.display(), "the kernel has been started since that was written");
            return Ok(Vec::new());
        }
        if version != VERSION {
            let why = format!("it is of version {version}, and this daemon understands {VERSION}");
            return Err(unreadable(why));
        }
        let content: Content<Vec<Given>> = serde_json::from_str(&text).map_err(parsed)?;
        Ok(content.given)
    }

    /// Makes the error that keeps the daemon from starting as if nobody had anything.
    pub(super) fn unusable(&self) -> impl Fn(String) -> StartError + use<> {
        let path = self.path.clone();
        move |why| StartError::Record { path: path.clone(), why }
    }

    fn text(&self) -> std::io::Result<Option<String>> {
        let mut options = OpenOptions::new();
        let opened = options.read(true).custom_flags(O_NOFOLLOW | O_NONBLOCK).open(&self.path);
        let mut file = match opened {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        let found = file.metadata()?;
        if !found.is_file() || !file_mode::is_owned(&found) || found.mode() & 0o077 != 0 {
            return Err(std::io::Error::other("others than vfio-brokerd can have written to it"));
        }
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        Ok(Some(text))
    }

    fn failed(call: &'static str, path: &Path, error: &std::io::Error) -> kernel::Error {
        let errno = error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
        kernel::Error::new(call, path.to_string_lossy(), errno)
    }

    /// Whole and on the disk before it gets its name: a machine that stops just then must not find half
    /// of it.
    fn write_new(path: &Path, text: &[u8]) -> kernel::Result<()> {
        // What is there is from a write that did not come to its end, or somebody's who could write to
        // the record then: in a directory like /tmp everybody can make one.
        let _ = std::fs::remove_file(path);
        let opened = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        let mut file: File = opened.map_err(|error| Self::failed("create", path, &error))?;
        file.write_all(text).map_err(|error| Self::failed("write", path, &error))?;
        file.sync_all().map_err(|error| Self::failed("fsync", path, &error))
    }
}

impl Record for RecordFile {
    fn write(&self, given: &[Given]) -> kernel::Result<()> {
        let header = Header { version: VERSION, boot: self.boot.clone() };
        let text = serde_json::to_vec(&Content { header, given });
        let text = text.map_err(|_| kernel::Error::new("write", "the record", Errno::EINVAL))?;
        let new = beside(&self.path, ".new");
        let written = Self::write_new(&new, &text).and_then(|()| {
            std::fs::rename(&new, &self.path)
                .map_err(|error| Self::failed("rename", &self.path, &error))
        });
        if written.is_err() {
            // What is left of it is overwritten by the next one.
            let _ = std::fs::remove_file(&new);
        }
        written
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    fn given(device: &str) -> Given {
        Given {
            device: device.parse().unwrap(),
            registration: u64::MAX,
            group: 26,
            members: vec![(device.parse().unwrap(), None)],
            lease: "00000000000000ff".into(),
            tenant: "vms".into(),
            people: "uid 1000".into(),
            vm: "web \"1\"".into(),
            uid: 1000,
            pid: 7,
            since: 1_800_000_000,
        }
    }

    fn file() -> (tempfile::TempDir, RecordFile) {
        let directory = tempfile::tempdir().unwrap();
        let file = RecordFile::of(&directory.path().join("broker.sock")).unwrap();
        (directory, file)
    }

    fn why(file: &RecordFile) -> String {
        match file.read() {
            Err(StartError::Record { why, .. }) => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_written_is_read_by_the_next() {
        let (directory, file) = file();
        assert_eq!(file.read().unwrap(), []);
        let two = [given("0000:65:00.0"), given("0000:66:00.0")];
        file.write(&two[..1]).unwrap();
        file.write(&two).unwrap();
        let next = RecordFile::of(&directory.path().join("broker.sock")).unwrap();
        assert_eq!(next.read().unwrap(), two);
        assert_eq!(std::fs::metadata(&file.path).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn another_boots_is_nobodys_whatever_its_version() {
        let (directory, file) = file();
        let boot = "another".to_owned();
        RecordFile { boot, path: file.path.clone() }.write(&[given("0000:65:00.0")]).unwrap();
        assert_eq!(file.read().unwrap(), []);
        std::fs::write(&file.path, "{\"version\":9,\"boot\":\"another\",\"more\":1}").unwrap();
        assert_eq!(file.read().unwrap(), []);
        drop(directory);
    }

    #[test]
    fn what_can_not_be_understood_is_an_error() {
        let (_directory, file) = file();
        file.write(&[given("0000:65:00.0")]).unwrap();
        let whole = std::fs::read_to_string(&file.path).unwrap();
        for end in 0..whole.len() {
            std::fs::write(&file.path, &whole[..end]).unwrap();
            why(&file);
        }
        std::fs::write(&file.path, whole.replace("\"version\":1", "\"version\":2")).unwrap();
        assert!(why(&file).contains("version 2"));
        std::fs::write(&file.path, whole.replace("65:00.0", "65:00.9")).unwrap();
        why(&file);
        std::fs::write(&file.path, [0xff; 64]).unwrap();
        why(&file);
    }

    #[test]
    fn what_others_can_have_written_is_an_error() {
        let (directory, file) = file();
        file.write(&[]).unwrap();
        std::fs::set_permissions(&file.path, Permissions::from_mode(0o660)).unwrap();
        assert!(why(&file).contains("others"));
        std::fs::remove_file(&file.path).unwrap();
        std::os::unix::fs::symlink(directory.path().join("elsewhere"), &file.path).unwrap();
        why(&file);
        std::fs::remove_file(&file.path).unwrap();
        std::fs::create_dir(&file.path).unwrap();
        why(&file);
    }

    #[test]
    fn a_file_that_others_have_made_does_not_become_the_record() {
        let (_directory, file) = file();
        let trap = beside(&file.path, ".new");
        std::fs::write(&trap, "").unwrap();
        std::fs::set_permissions(&trap, Permissions::from_mode(0o666)).unwrap();
        let mut theirs = File::open(&trap).unwrap();
        file.write(&[given("0000:65:00.0")]).unwrap();
        assert_eq!(file.read().unwrap(), [given("0000:65:00.0")]);
        let mut seen = String::new();
        theirs.read_to_string(&mut seen).unwrap();
        assert_eq!(seen, "");
        std::os::unix::fs::symlink(file.path.with_file_name("elsewhere"), &trap).unwrap();
        file.write(&[]).unwrap();
        assert_eq!(file.read().unwrap(), []);
    }

    #[test]
    fn what_can_not_be_written_leaves_what_was_there() {
        let (directory, file) = file();
        file.write(&[given("0000:65:00.0")]).unwrap();
        std::fs::create_dir(beside(&file.path, ".new")).unwrap();
        let error = file.write(&[]).unwrap_err();
        assert_eq!((error.call, error.errno), ("create", Errno::EEXIST));
        assert_eq!(file.read().unwrap(), [given("0000:65:00.0")]);
        std::fs::remove_dir(beside(&file.path, ".new")).unwrap();
        std::fs::remove_file(&file.path).unwrap();
        std::fs::create_dir(&file.path).unwrap();
        let error = file.write(&[]).unwrap_err();
        assert_eq!((error.call, error.errno), ("rename", Errno::EISDIR));
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "the new one stays");
    }
}
