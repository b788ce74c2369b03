//! GetFds: the open files of a lease once more.

use super::acquire::object;
use super::books::Entry;
use super::keeper::{NotDone, Turn};
use super::{Broker, Caller, Delivery, no_such_lease};
use crate::ledger::Lease;
use crate::process::keeper::{Deliver, Reopen, Undo, Wanted};
use crate::protocol::{Error, GetFds, Handout};
use nix::errno::Errno;
use serde_json::json;
use std::os::fd::BorrowedFd;
use std::rc::Rc;
use std::time::Duration;
use tokio::time::Instant;

/// How long is waited before what is in use is asked for again, in milliseconds: a process that is being
/// started has a copy of what its parent has for a moment.
const BEFORE_BUSY: [u64; 7] = [0, 1, 2, 4, 8, 16, 32];

impl Broker {
    /// The open files of a lease once more, and a further lifeline unless the request wants none: the
    /// same files where its keeper has them, else opened anew. The reply goes to `client` by way of the
    /// keeper.
    ///
    /// # Errors
    /// What the kernel says where it must be asked: EBUSY while somebody has the group open.
    pub async fn get_fds(
        self: &Rc<Self>,
        caller: &Caller,
        client: BorrowedFd<'_>,
        request: &GetFds,
    ) -> Result<Delivery, Error> {
        let until = Instant::now() + self.deadline;
        let entry = self.authorize(caller, &request.lease, &request.key)?;
        let lease = self.books().ledger.live(entry.id).cloned();
        let lease = lease.ok_or_else(|| no_such_lease(entry.id))?;
        check_kept_any(&lease, request)?;
        let mut turn = entry.keeper.turn_until("GetFds", until).await?;
        if lease.handout != Handout::Container {
            turn = self.reopen(&entry, turn, request, until).await?;
        }
        let lifeline = request.lifeline.unwrap_or(true);
        let kept = Some(wanted(request));
        let tenant = entry.tenant.borrow().clone();
        let room = self.check_kept(&self.books(), &tenant, u64::from(lifeline));
        if let Err(error) = room {
            let _ = turn.ask(&Undo { lease: entry.id.to_string() }, &[]).await;
            return Err(error);
        }
        let lease = entry.id.to_string();
        let deliver = Deliver { lease, parameters: object(json!({})), lifeline, kept };
        match turn.ask(&deliver, &[client]).await {
            Ok(delivered) => {
                if let Some(state) = delivered.state {
                    self.learn(&entry.keeper, state);
                }
                Ok(delivered.whole.into())
            }
            // It may have been delivered.
            Err(NotDone::Lost(_)) => Ok(Delivery::Part),
            Err(why) => Err(self.not_done(why, entry.id, &[], "GetFds")),
        }
    }

    async fn reopen(
        self: &Rc<Self>,
        entry: &Rc<Entry>,
        turn: Turn,
        request: &GetFds,
        until: Instant,
    ) -> Result<Turn, Error> {
        let (broker, id, lease) = (Rc::clone(self), entry.id, entry.id.to_string());
        let call = Reopen { lease: lease.clone(), wanted: wanted(request) };
        let work = async move {
            let mut turn = turn;
            let mut result = turn.ask(&call, &[]).await;
            for wait in BEFORE_BUSY {
                let Err(NotDone::Failed(failure)) = &result else { break };
                if failure.errno() != Some(Errno::EBUSY) {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(wait)).await;
                result = turn.ask(&call, &[]).await;
            }
            result.map(|_| turn).map_err(|why| broker.not_done(why, id, &[], "GetFds"))
        };
        let undo = Undo { lease: lease.clone() };
        let late = move |mut turn: Turn| async move {
            let _ = turn.ask(&undo, &[]).await;
        };
        self.in_time(("GetFds", &lease), until, work, late).await
    }
}

fn wanted(request: &GetFds) -> Wanted {
    Wanted { kind: request.kind, name: request.name.clone() }
}

/// Whether there is something to be had once more.
fn check_kept_any(lease: &Lease, asked: &GetFds) -> Result<(), Error> {
    if lease.handout != Handout::Iommufd || asked.kind.is_some() {
        return Ok(());
    }
    Err(Error::Unsupported {
        what: "GetFds of handout iommufd".into(),
        why: "the broker keeps no copies of an iommufd and its cdevs, so that closing them frees \
              the devices: whoever needs them again keeps a copy, or says by kind what is to be \
              opened anew"
            .into(),
    })
}
