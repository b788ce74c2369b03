//! A failed kernel call: which call, on what, with which errno.

use nix::errno::Errno;

/// The result of a typed kernel call.
pub type Result<T> = std::result::Result<T, Error>;

/// A kernel call that failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{call} on {object}: {} ({}){}", errno.desc(), errno_name(*.errno), after(.note))]
pub struct Error {
    /// The call as the headers name it, such as `VFIO_GROUP_SET_CONTAINER` or `open`.
    pub call: &'static str,
    /// The object it was made on, such as `/dev/vfio/26` or `0000:65:00.0`.
    pub object: String,
    /// What the kernel answered.
    pub errno: Errno,
    /// What the errno alone does not say, such as the limit that was met.
    pub note: Option<Box<str>>,
}

/// The symbolic name of an errno, such as `EBUSY`.
fn errno_name(errno: Errno) -> String {
    format!("{errno:?}")
}

fn after(note: &Option<Box<str>>) -> String {
    note.as_ref().map_or(String::new(), |note| format!("; {note}"))
}

impl Error {
    /// An error of `call` on `object`.
    pub fn new(call: &'static str, object: impl Into<String>, errno: Errno) -> Self {
        Self { call, object: object.into(), errno, note: None }
    }
}
