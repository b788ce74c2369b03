//! Confirm: an administrator's word where the kernel can't show that a device is closed everywhere.

use super::error::told;
use super::keeper::KeeperHandle;
use super::{Broker, Caller, said};
use crate::ledger::{GroupState, Request};
use crate::process::keeper::{self, Stage};
use crate::process::launcher::Standing;
use crate::process::link::Asking;
use crate::protocol::{Bdf, Confirm, Confirmed, Error};
use nix::errno::Errno;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;
use tokio::task::yield_now;
use tokio::time::{Instant, sleep, timeout_at};

/// How many keepers' states are read before others have their turn.
const STEP: usize = 32;

/// How often a way to a keeper is looked for that begins.
const PAUSE: Duration = Duration::from_millis(5);

impl Broker {
    /// Takes an administrator's word that nobody has a device open. A tenant's manager has no such word:
    /// who would be harmed by a wrong one is the next tenant.
    ///
    /// # Errors
    /// The caller is no administrator, or the kernel itself says what the device is; then nothing has
    /// changed.
    pub async fn confirm(
        self: &Rc<Self>,
        caller: &Caller,
        client: BorrowedFd<'_>,
        request: &Confirm,
    ) -> Result<Confirmed, Error> {
        if !self.administers(caller) {
            return Err(Error::Denied {
                rule: "an administrator's word".into(),
                reason:
                    "only root, or whoever the broker runs as, can confirm that a device is free"
                        .into(),
                file: None,
                line: None,
                device: Some(said(&request.device).into()),
            });
        }
        let device: Bdf = request.device.parse().map_err(|error| Error::bad("device", error))?;
        // What the kernel shows by now needs nobody's word.
        self.look_for_proof("", |_| true);
        let group = self.unproved_of(device).ok_or_else(|| self.not_to_confirm(device))?;
        let until = Instant::now() + self.deadline;
        self.have_forgotten(group, device, client, until).await?;
        let mut books = self.books();
        let unproved = books.ledger.unproved_group(group);
        let registration = unproved.and_then(|unproved| unproved.left.get(&device).copied());
        if let Some(registration) = registration {
            let _ = books.ledger.apply(Request::Proved { group, device, registration });
        }
        let left = books.ledger.unproved_group(group);
        let left = left.into_iter().flat_map(|unproved| unproved.left.keys());
        let left = left.map(ToString::to_string).collect();
        drop(books);
        self.has_changed();
        Ok(Confirmed { group, left })
    }

    /// The group that a device keeps from others, because it may be open.
    fn unproved_of(&self, device: Bdf) -> Option<u32> {
        let books = self.books();
        let mut all = books.ledger.unproved();
        all.find(|(_, unproved)| unproved.left.contains_key(&device)).map(|(id, _)| id)
    }

    /// Why nobody's word is asked for.
    fn not_to_confirm(&self, device: Bdf) -> Error {
        let books = self.books();
        let mut groups = books.ledger.groups();
        let group = groups.find(|(_, group)| group.members.iter().any(|it| it.bdf == device));
        let why = match group.map(|(_, group)| &group.state) {
            None => "it is not kept from anybody: there is nothing to confirm".to_owned(),
            Some(GroupState::Acquiring | GroupState::Held) => "a lease has it".to_owned(),
            Some(GroupState::Reclaiming { .. }) => "the kernel is just being asked".to_owned(),
            Some(GroupState::Quarantined { why, .. }) => {
                format!("the kernel says itself that it is not free: {}", told(why).0)
            }
        };
        Error::Conflict { what: device.to_string(), why }
    }

    /// Has the keepers that would tell the next broker of it forget it.
    async fn have_forgotten(
        &self,
        group: u32,
        device: Bdf,
        client: BorrowedFd<'_>,
        until: Instant,
    ) -> Result<(), Error> {
        let mut all = self.kept();
        let mut at = 0;
        while let Some(kept) = all.next().await? {
            at += 1;
            if at % STEP == 0 {
                yield_now().await;
            }
            let Ok(saved) = kept.saved() else { continue };
            let remembers = |state: &keeper::LeaseState| {
                state.groups.iter().any(|it| {
                    let left = match &it.stage {
                        Stage::Unbound(left) => left.contains_key(&device),
                        _ => false,
                    };
                    it.group.id == group && left
                })
            };
            for state in saved.leases.iter().filter(|state| remembers(state)) {
                let lease = state.record.lease.clone();
                let call = keeper::Confirm { lease, group, device };
                self.ask_anew(&kept.name, call, client, until).await?;
            }
        }
        Ok(())
    }

    /// A link to a keeper, or to one that takes over what it has left; `None` where that is nothing.
    async fn link_or_salvage(
        &self,
        name: &str,
        until: Instant,
    ) -> std::io::Result<Option<OwnedFd>> {
        let mut is_salvaged = false;
        loop {
            let (standing, links) = self.keepers.find(name).await?;
            match (standing, links) {
                (Standing::Gone, _) => return Ok(None),
                (_, Some([link, _])) => return Ok(Some(link)),
                (Standing::Dead, None) if !is_salvaged => {
                    self.keepers.salvage(name).await?;
                    is_salvaged = true;
                }
                _ if Instant::now() >= until => return Err(Errno::ETIMEDOUT.into()),
                _ => sleep(PAUSE).await,
            }
        }
    }

    /// Asks a keeper on a link of its own: of what was only left open, nothing else asks, and so nobody has
    /// seen where it was killed.
    async fn ask_anew(
        &self,
        name: &str,
        call: keeper::Confirm,
        client: BorrowedFd<'_>,
        until: Instant,
    ) -> Result<(), Error> {
        let failed = |error: std::io::Error| super::attend::started("connect", name, &error);
        let Some(link) = self.link_or_salvage(name, until).await.map_err(failed)? else {
            return Ok(());
        };
        let handle = KeeperHandle::new(name.to_owned());
        handle.set_link(Some(Asking::new(link).map_err(failed)?));
        let mut turn = handle.turn_until("Confirm", until).await?;
        let asked = timeout_at(until, turn.ask(&call, &[client])).await;
        match asked.map_err(|_| super::error::no_answer("Confirm", name))? {
            Ok(_) => Ok(()),
            Err(why) => {
                let id =
                    call.lease.parse().map_err(|_| super::error::no_answer("Confirm", name))?;
                Err(self.not_done(why, id, &[], "Confirm"))
            }
        }
    }
}
