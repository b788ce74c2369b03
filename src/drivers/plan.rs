//! A plan: writes to sysfs that are made in order, and undone in reverse order if one fails.

use crate::kernel::{Error, Kernel};

/// A write to a file of sysfs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Write {
    pub(super) path: String,
    pub(super) text: String,
}

/// A write, and the one that undoes it where there is one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) does: Write,
    pub(super) undo: Option<Write>,
}

/// Why a plan was not carried out, and what of it could not be undone.
#[derive(Debug, thiserror::Error)]
#[error("{error}{}", not_undone.iter().map(|it| format!("; not undone: {it}")).collect::<String>())]
pub struct Failed {
    /// The write that failed.
    pub error: Error,
    /// The writes that would have undone those before it, and failed too.
    pub not_undone: Vec<Error>,
}

impl Write {
    fn make(&self, kernel: &dyn Kernel) -> Result<(), Error> {
        let made = kernel.sysfs_write(&self.path, self.text.as_bytes());
        made.map_err(|errno| Error::new("write", format!("/sys/{}", self.path), errno))
    }
}

/// Carries a plan out, or leaves things as they were before, as far as that works.
///
/// # Errors
/// [`Failed`]: the first write that failed.
pub(super) fn apply(kernel: &dyn Kernel, plan: &[Step]) -> Result<(), Failed> {
    for (done, step) in plan.iter().enumerate() {
        if let Err(error) = step.does.make(kernel) {
            let undo = plan.iter().take(done).rev().filter_map(|step| step.undo.as_ref());
            let not_undone = undo.filter_map(|write| write.make(kernel).err()).collect();
            return Err(Failed { error, not_undone });
        }
    }
    Ok(())
}
