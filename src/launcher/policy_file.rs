//! The policy: from its file to what broker and keepers go by.

use super::StartError;
use super::file_mode;
use super::options::Options;
use crate::host::Host;
use crate::kernel::Kernel;
use crate::policy::{BUILT_IN, POLICY_PATH, Policy};
use crate::users::SystemUsers;
use std::fs::File;
use std::path::{Path, PathBuf};
use tracing::{info, warn};

/// The policy of the options, or the default one for the kernel they name.
pub(super) fn read(options: &Options, kernel: &dyn Kernel) -> Result<Policy, StartError> {
    let parse = |name: &str, text: &str| {
        let policy = Policy::parse(name, text, &SystemUsers).map_err(StartError::Policy)?;
        for problem in policy.warnings().iter() {
            warn!("{}:{}: {}", problem.file, problem.line, problem.message);
        }
        info!(policy = name, tenants = policy.tenants().len(), "policy read");
        Ok(policy)
    };
    let beside = options.sim.as_ref().map(|sim| sim.with_extension("policy.toml"));
    let path = match (&options.policy, beside) {
        (Some(path), _) => path.clone(),
        (None, Some(beside)) if beside.exists() => beside,
        (None, Some(_)) => return parse(BUILT_IN, &sim_policy(kernel)?),
        (None, None) => PathBuf::from(POLICY_PATH),
    };
    parse(&path.to_string_lossy(), &text(&path)?)
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
