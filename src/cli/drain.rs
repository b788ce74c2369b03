//! `vfio-broker drain`: takes all leases back.

use super::revoke::{Grace, code, text};
use super::style::{complain, print, print_json_line};
use super::{Context, EXIT_CODES, Failure};
use std::process::ExitCode;

/// Take all leases back from their holders
///
/// Each as `revoke` does, all at the same time: for root all that there are, for who has the right "manage"
/// those of its tenant. Leases that are acquired meanwhile stay; a policy that allows nothing, read again,
/// keeps anybody from that.
#[derive(Debug, clap::Args)]
#[command(after_help = EXIT_CODES)]
pub(super) struct Args {
    #[command(flatten)]
    grace: Grace,
}

/// With JSON a line for each lease, as soon as it is over.
pub(super) fn run(context: &Context, args: &Args) -> Result<ExitCode, Failure> {
    let grace = args.grace.grace;
    if !context.json && !grace.is_zero() {
        let seconds = grace.as_secs();
        complain(&format!(
            "asking for them; once accepted, holders have {seconds} s, and Ctrl-C stops nothing\n"
        ));
    }
    let mut broker = context.connect()?;
    let mut failed = None;
    let all = broker.drain(grace, |revoked| {
        let shown = match context.json {
            true => print_json_line(revoked),
            false => print(&text(revoked)),
        };
        failed = failed.take().or(shown.err());
    })?;
    if let Some(error) = failed {
        return Err(error.into());
    }
    if all.is_empty() && !context.json {
        print("no leases that you may take back\n")?;
    }
    Ok(code(&all))
}
