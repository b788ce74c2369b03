//! SIGHUP: another policy while everything goes on.

use super::start::notify;
use super::{Daemon, warn_of_quotas};
use sd_notify::NotifyState;
use std::rc::Rc;
use std::sync::Arc;
use tokio::signal::unix::Signal;
use tokio::task::spawn_blocking;
use tracing::{error, info};

/// Reads the policy again at each SIGHUP.
pub(super) async fn at_each(mut hang_up: Signal, daemon: Rc<Daemon>) {
    while hang_up.recv().await.is_some() {
        let since = NotifyState::monotonic_usec_now().ok();
        notify(&[Some(NotifyState::Reloading), since].into_iter().flatten().collect::<Vec<_>>());
        reload(&daemon).await;
        notify(&[NotifyState::Ready]);
    }
}

/// Reads the policy; one that can't be used leaves the one that is in force.
async fn reload(daemon: &Daemon) {
    let source = daemon.policy_file.source();
    let Ok(read) = spawn_blocking(move || source.read()).await else {
        return error!("policy not read: its thread has ended; the one before stays in force");
    };
    match daemon.policy_file.note(read) {
        Ok(policy) => {
            let policy = Arc::new(policy);
            warn_of_quotas(&policy, &daemon.open_files);
            daemon.broker.replace_policy(policy);
            daemon.broker.judge_leases().await;
            info!(policy = daemon.policy_file.name(), "another policy is in force");
        }
        Err(_) => {
            let why = daemon.policy_file.status().failed.map(|(_, why)| why).unwrap_or_default();
            error!(why, "policy refused; the one before stays in force");
        }
    }
}
