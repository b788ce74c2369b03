//! Where the policy is, reading it, and what came of that.

use super::options::Options;
use super::{StartError, file_mode, simulation};
use crate::host::Host;
use crate::keeper::{Machine, Place, PolicyInForce};
use crate::kernel::Kernel;
use crate::policy::{BUILT_IN, POLICY_PATH, Policy};
use crate::process::launcher::PolicyRead;
use crate::sys::process::now;
use crate::users::SystemUsers;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tracing::{info, warn};

/// What a policy is read from.
#[derive(Debug)]
pub(super) struct PolicyFile {
    path: Option<PathBuf>,
    sim: Option<PathBuf>,
    machine: Machine,
    read: PolicyRead,
}

impl PolicyFile {
    pub(super) fn new(options: &Options, machine: Machine) -> Self {
        let read = PolicyRead::default();
        Self { path: options.policy.clone(), sim: options.sim.clone(), machine, read }
    }

    /// Reads it, and takes down what came of that.
    pub(super) fn read(&mut self) -> Result<Policy, StartError> {
        let path = self.path();
        self.read.name =
            path.as_ref().map_or(BUILT_IN.into(), |path| path.to_string_lossy().into_owned());
        let policy = self.parsed(path.as_deref());
        match &policy {
            Ok(_) => (self.read.read, self.read.refused) = (now(), None),
            Err(error) => self.read.refused = Some((now(), in_a_line(error))),
        }
        policy
    }

    /// What came of reading it.
    pub(super) fn status(&self) -> &PolicyRead {
        &self.read
    }

    fn parsed(&self, path: Option<&Path>) -> Result<Policy, StartError> {
        let text = match path {
            Some(path) => text(path)?,
            None => sim_policy(&*simulation::kernel(&self.machine)?)?,
        };
        let name = &self.read.name;
        let policy = Policy::parse(name, &text, &SystemUsers).map_err(StartError::Policy)?;
        let policy = self.with_serials(policy)?;
        for problem in policy.warnings().iter() {
            warn!("{}:{}: {}", problem.file, problem.line, problem.message);
        }
        info!(policy = name, tenants = policy.tenants().len(), "policy read");
        Ok(policy)
    }

    /// The policy with what its rules may want to know and only root can read.
    fn with_serials(&self, policy: Policy) -> Result<Policy, StartError> {
        if !policy.names_serials() {
            return Ok(policy);
        }
        let kernel = simulation::kernel(&self.machine)?;
        match Host::scan(&*kernel).and_then(|mut host| host.serials(&*kernel)) {
            Ok(serials) => Ok(policy.with_serials(serials)),
            Err(error) => {
                warn!(%error, "can't read serial numbers: no entry that names one allows anything");
                Ok(policy)
            }
        }
    }

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
}

/// Puts the compiled policy where keepers find it, those of earlier launchers too; gives it as a file to
/// be read from.
///
/// # Errors
/// See open(2), write(2) and rename(2).
pub(super) fn put_in_force(
    policy: Policy,
    place: &Place,
) -> std::io::Result<(PolicyInForce, File)> {
    let (path, new) = (place.policy(), place.path().join("policy.new"));
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = options.custom_flags(nix::libc::O_NOFOLLOW).open(&new)?;
    file.write_all(&serde_json::to_vec(&policy)?)?;
    // The broker gets it, and must not be able to write there.
    let file = File::open(&new)?;
    std::fs::rename(&new, &path)?;
    Ok((PolicyInForce::new(path, &file, Arc::new(policy))?, file))
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

/// The text of a policy that nobody but root and us has written.
fn text(path: &Path) -> Result<String, StartError> {
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
