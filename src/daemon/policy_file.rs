//! Where the policy is, reading it, and what came of that.

use super::file_mode;
use super::now;
use super::options::Options;
use super::start_error::StartError;
use crate::host::Host;
use crate::kernel::Kernel;
use crate::policy::{BUILT_IN, POLICY_PATH, Policy};
use crate::users::SystemUsers;
use std::cell::RefCell;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tracing::{info, warn};

/// The policy's file, and what is known of it.
#[derive(Debug)]
pub(super) struct PolicyFile {
    source: Source,
    status: RefCell<PolicyStatus>,
}

/// When a policy was read, and whether a later one was refused.
#[derive(Clone, Debug, Default)]
pub(super) struct PolicyStatus {
    /// When the one in force was read, in seconds since 1970.
    pub(super) read: u64,
    /// What is wrong with what was read last, and when that was.
    pub(super) failed: Option<(u64, String)>,
}

/// What a policy is read from; can be taken to another thread.
#[derive(Clone, Debug)]
pub(super) struct Source {
    path: Option<PathBuf>,
    sim: Option<PathBuf>,
    kernel: Arc<dyn Kernel>,
}

impl PolicyFile {
    pub(super) fn new(options: &Options, kernel: Arc<dyn Kernel>) -> Self {
        let source = Source { path: options.policy.clone(), sim: options.sim.clone(), kernel };
        Self { source, status: RefCell::default() }
    }

    /// Reads it here and now.
    pub(super) fn read(&self) -> Result<Policy, StartError> {
        self.note(self.source.read())
    }

    pub(super) fn source(&self) -> Source {
        self.source.clone()
    }

    /// Takes down what came of reading it.
    pub(super) fn note(&self, read: Result<Policy, StartError>) -> Result<Policy, StartError> {
        let at = now();
        let mut status = self.status.borrow_mut();
        match &read {
            Ok(_) => *status = PolicyStatus { read: at, failed: None },
            Err(error) => status.failed = Some((at, in_a_line(error))),
        }
        drop(status);
        read
    }

    pub(super) fn status(&self) -> PolicyStatus {
        self.status.borrow().clone()
    }

    /// What it is called.
    pub(super) fn name(&self) -> String {
        self.source.path().map_or(BUILT_IN.into(), |path| path.to_string_lossy().into_owned())
    }
}

/// What is wrong, with its place, without the lines of the file.
fn in_a_line(error: &StartError) -> String {
    let problems = match error {
        StartError::Policy(problems) => problems,
        // Without the example for those who begin.
        StartError::NoPolicy(path) => return format!("there is no {} any more", path.display()),
        error => return error.to_string(),
    };
    let each = problems.iter().map(|it| {
        let help = it.help.as_ref().map_or(String::new(), |help| format!(" ({help})"));
        format!("{}:{}:{}: {}{help}", it.file, it.line, it.column, it.message)
    });
    each.collect::<Vec<_>>().join("; ")
}

impl Source {
    /// The file of the options, or the default one for the kernel they name; none where all of a
    /// simulated host is everybody's.
    fn path(&self) -> Option<PathBuf> {
        let beside = self.sim.as_ref().map(|sim| sim.with_extension("policy.toml"));
        match (&self.path, beside) {
            (Some(path), _) => Some(path.clone()),
            (None, Some(beside)) => beside.exists().then_some(beside),
            (None, None) => Some(PathBuf::from(POLICY_PATH)),
        }
    }

    /// Reads it. Can wait for a file system, and for whoever knows users' names.
    pub(super) fn read(&self) -> Result<Policy, StartError> {
        let (name, text) = match self.path() {
            Some(path) => (path.to_string_lossy().into_owned(), read_policy(&path)?),
            None => (BUILT_IN.to_owned(), sim_policy(&*self.kernel)?),
        };
        let policy = Policy::parse(&name, &text, &SystemUsers).map_err(StartError::Policy)?;
        for problem in policy.warnings().iter() {
            warn!("{}:{}: {}", problem.file, problem.line, problem.message);
        }
        info!(policy = name, tenants = policy.tenants().len(), "policy read");
        Ok(policy)
    }
}

/// The text of a policy that nobody but root and us has written.
fn read_policy(path: &Path) -> Result<String, StartError> {
    let unreadable = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::NotFound => StartError::NoPolicy(path.to_owned()),
        _ => StartError::UnreadablePolicy { path: path.to_owned(), source },
    };
    // What is looked at is what is read, whatever becomes of the path in between.
    let file = File::open(path).map_err(unreadable)?;
    if !file_mode::is_file_safe(&file.metadata().map_err(unreadable)?) {
        return Err(StartError::UnsafePolicy(path.to_owned()));
    }
    std::io::read_to_string(file).map_err(unreadable)
}

/// Lets everybody have every device of a simulated host, each handout and each risk included.
fn sim_policy(kernel: &dyn Kernel) -> Result<String, StartError> {
    let host = Host::scan(kernel).map_err(|error| StartError::Sim(error.to_string()))?;
    let devices: Vec<_> = host.devices().map(|(_, d)| format!("\"{}\"", d.facts.bdf)).collect();
    Ok(format!(
        "version = 1\n[[tenant]]\nname = \"everybody\"\nanyone = true\ndevices = [{}]\n\
         handouts = [\"container\", \"group\", \"devices\", \"iommufd\"]\n\
         accept = [\"unsafe-interrupts\", \"no-iommu\"]\n",
        devices.join(", ")
    ))
}
