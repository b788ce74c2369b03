//! What the policy is read from, and reading and compiling it: the work of a process of its own, because
//! a file and a name service can keep whoever asks them waiting.

use super::options::Options;
use super::{file_mode, simulation};
use crate::host::Host;
use crate::keeper::Machine;
use crate::kernel::Kernel;
use crate::policy::{BUILT_IN, POLICY_PATH, Policy, Problems};
use crate::users::SystemUsers;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::path::{Path, PathBuf};
use tracing::{info, warn};

/// Where the policy is.
#[derive(Debug)]
pub(super) struct PolicySource {
    path: Option<PathBuf>,
    sim: Option<PathBuf>,
    machine: Machine,
}

/// What came of reading it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Compiled {
    /// What it is called.
    pub(super) name: String,
    pub(super) policy: Result<Policy, Refused>,
    /// The uid and gid of the broker's own user, where the system has one.
    pub(super) broker: Option<(u32, u32)>,
}

/// Why a policy can't be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Refused {
    /// For who starts the daemon.
    pub(super) text: String,
    /// For the log and the status of one that has a policy.
    pub(super) line: String,
}

#[derive(Debug, thiserror::Error)]
enum Problem {
    #[error(
        "there is no policy at {0}: nobody may have anything without one. A first one:\n\n{EXAMPLE}"
    )]
    None(PathBuf),
    #[error("can't read the policy {path}: {source}")]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error(
        "others than root and you can write to the policy {0}: \"chown root {0}; chmod go-w {0}\" \
         once you have read what it says now"
    )]
    Unsafe(PathBuf),
    #[error("{0}")]
    Wrong(Problems),
    #[error("{0}")]
    Machine(String),
}

/// The start of a policy, for those who have none.
const EXAMPLE: &str = include_str!("example.policy.toml");

/// The name of the broker's user, where the system has one.
const BROKER_NAME: &str = "vfio-broker";

impl PolicySource {
    pub(super) fn new(options: &Options, machine: Machine) -> Self {
        Self { path: options.policy.clone(), sim: options.sim.clone(), machine }
    }

    /// What comes of one that could not be read. It is where it most likely is: nobody has looked.
    pub(super) fn unread(&self, why: &str) -> Compiled {
        let beside = || self.sim.as_ref().map(|sim| sim.with_extension("policy.toml"));
        let path = self.path.clone().or_else(beside).unwrap_or_else(|| POLICY_PATH.into());
        let why = format!("can't read the policy {}: {why}", path.display());
        let policy = Err(Refused { text: why.clone(), line: why });
        Compiled { name: path.to_string_lossy().into_owned(), policy, broker: None }
    }

    /// Reads and compiles it. May take as long as files and name services like.
    pub(super) fn compile(&self) -> Compiled {
        let path = self.path();
        let name = path.as_ref().map_or(BUILT_IN.into(), |it| it.to_string_lossy().into_owned());
        let policy = self.parsed(path.as_deref(), &name);
        let policy = policy.map_err(|why| Refused { text: why.to_string(), line: why.in_a_line() });
        Compiled { name, policy, broker: broker_user() }
    }

    fn parsed(&self, path: Option<&Path>, name: &str) -> Result<Policy, Problem> {
        let text = match path {
            Some(path) => text(path)?,
            None => sim_policy(&*self.kernel()?)?,
        };
        // A refusal names what to mend, and not what would be warned of in a good file.
        let wrong = |problems: Problems| Problem::Wrong(problems.into_errors());
        let policy = Policy::parse(name, &text, &SystemUsers).map_err(wrong)?;
        let policy = self.with_serials(policy)?;
        for problem in policy.warnings().iter() {
            warn!("{}:{}: {}", problem.file, problem.line, problem.message);
        }
        info!(policy = name, tenants = policy.tenants().len(), "policy read");
        Ok(policy)
    }

    fn kernel(&self) -> Result<std::sync::Arc<dyn Kernel>, Problem> {
        simulation::kernel(&self.machine).map_err(|error| Problem::Machine(error.to_string()))
    }

    /// The policy with what its rules may want to know and only root can read.
    fn with_serials(&self, policy: Policy) -> Result<Policy, Problem> {
        if !policy.names_serials() {
            return Ok(policy);
        }
        let kernel = self.kernel()?;
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

impl Problem {
    /// What is wrong, with its place, without the lines of the file.
    fn in_a_line(&self) -> String {
        let problems = match self {
            Self::Wrong(problems) => problems,
            // Without the example for those who begin.
            Self::None(path) => return format!("there is no {} any more", path.display()),
            other => return other.to_string(),
        };
        let each = problems.iter().map(|it| {
            let help = it.help.as_ref().map_or(String::new(), |help| format!(" ({help})"));
            format!("{}:{}:{}: {}{help}", it.file, it.line, it.column, it.message)
        });
        let each: Vec<_> = each.collect();
        let count = if each.len() > 1 { format!("{} errors: ", each.len()) } else { String::new() };
        format!("{count}{}", each.join("; "))
    }
}

fn broker_user() -> Option<(u32, u32)> {
    let user = nix::unistd::User::from_name(BROKER_NAME).ok().flatten()?;
    (!user.uid.is_root()).then(|| (user.uid.as_raw(), user.gid.as_raw()))
}

/// The text of a policy that nobody but root and us has written.
fn text(path: &Path) -> Result<String, Problem> {
    let unreadable = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::NotFound => Problem::None(path.to_owned()),
        _ => Problem::Unreadable { path: path.to_owned(), source },
    };
    // What is looked at is what is read, whatever becomes of the path in between.
    let file = File::open(path).map_err(unreadable)?;
    if !file_mode::is_file_safe(&file.metadata().map_err(unreadable)?) {
        return Err(Problem::Unsafe(path.to_owned()));
    }
    std::io::read_to_string(file).map_err(unreadable)
}

/// Lets everybody have every device of a simulated host, each handout and each risk included.
fn sim_policy(kernel: &dyn Kernel) -> Result<String, Problem> {
    let host = Host::scan(kernel).map_err(|error| Problem::Machine(error.to_string()))?;
    let devices: Vec<_> = host.devices().map(|(_, d)| format!("\"{}\"", d.facts.bdf)).collect();
    Ok(format!(
        "version = 1\n[[tenant]]\nname = \"everybody\"\nanyone = true\ndevices = [{}]\n\
         handouts = [\"container\", \"group\", \"devices\", \"iommufd\"]\n\
         accept = [\"unsafe-interrupts\", \"no-iommu\"]\n",
        devices.join(", ")
    ))
}
