//! Another policy while everything goes on.

use super::launcher_link::whole;
use super::{Daemon, warn_of_quotas};
use crate::policy::Policy;
use crate::process::launcher::{InForce, PolicyRead};
use std::io::Result;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use tracing::{error, info};

/// Takes what came of reading the policy again; without a compiled one the one before stays in force.
pub(super) async fn take(daemon: &Daemon, read: PolicyRead, compiled: Option<OwnedFd>) {
    let name = read.name.clone();
    let refused = read.refused.as_ref().map(|(_, why)| why.clone());
    daemon.policy.replace(read);
    let Some(file) = compiled else {
        let why = refused.unwrap_or_default();
        return error!(why, "policy refused; the one before stays in force");
    };
    match policy(file) {
        Ok(policy) => {
            warn_of_quotas(&policy, &daemon.open_files);
            daemon.broker.replace_policy(policy);
            daemon.broker.judge_leases().await;
            info!(policy = name, "another policy is in force");
        }
        Err(error) => error!(%error, "policy lost; the one before stays in force"),
    }
}

/// The policy in a file.
fn policy(file: OwnedFd) -> Result<Arc<Policy>> {
    Ok(serde_json::from_slice::<InForce>(&whole(file)?)?.policy)
}
