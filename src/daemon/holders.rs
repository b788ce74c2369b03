//! Looking for processes that have something open: that can hang, and takes rights that the broker has not.
//! So another process does it, which is killed when it takes too long; what it told until then counts.

use super::launcher_link::LauncherLink;
use super::receiver::{HelperProcess, has_not_ended, receive};
use crate::process::holders::{MOST_BYTES, Report, Search};
use crate::process::role::Helper;
use crate::sys::fdpass;
use nix::errno::Errno;
use nix::sys::socket::MsgFlags;
use std::io::{Error, Result};
use std::os::fd::AsFd;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// How long it may look, and then take to end.
const PATIENCE: Duration = Duration::from_secs(3);
const ENDING_PATIENCE: Duration = Duration::from_millis(200);

/// Has a process look for holders.
///
/// # Errors
/// It could not be started, has told nothing, or the one before it does not end.
pub(super) async fn look(launcher: &LauncherLink, search: &Search) -> Result<Report> {
    if launcher.looker.borrow().as_ref().is_some_and(has_not_ended) {
        return Err(Error::other("the process that looked last hangs in /proc and does not end"));
    }
    let helper = HelperProcess::start(launcher, Helper::Holders).await?;
    let until = Instant::now() + PATIENCE;
    let bytes = serde_json::to_vec(search)?;
    let sent = fdpass::send(helper.link.as_fd(), &bytes, &[], MsgFlags::MSG_DONTWAIT);
    let mut last = None;
    let mut buffer = vec![0; MOST_BYTES];
    while sent.is_ok()
        && let Ok(Ok(got)) = timeout_at(until, receive(&helper.link, &mut buffer)).await
        && let Ok(report) = serde_json::from_slice::<Report>(&buffer[..got.len])
    {
        let is_last = report.is_whole || report.found.is_empty();
        last = Some(report);
        if is_last {
            break;
        }
    }
    let stuck = helper.end_within(launcher, ENDING_PATIENCE).await.err();
    launcher.looker.replace(stuck);
    sent?;
    last.ok_or_else(|| Errno::ETIMEDOUT.into())
}
