//! What shows that a device's own node is closed everywhere.

use super::Broker;
use crate::host;
use crate::ledger::{Request, Unproved};
use crate::protocol::Bdf;

impl Broker {
    /// Looks whether nodes that are not known to be closed are: those of `tenant`, and those of
    /// the groups that are asked for. What can't be read shows nothing.
    pub(super) fn look_for_proof(&self, tenant: &str, concerns: impl Fn(u32) -> bool) {
        let unproved: Vec<(u32, Unproved)> = {
            let books = self.books();
            let all = books.ledger.unproved();
            let those = all.filter(|(id, left)| left.tenant == tenant || concerns(*id));
            those.map(|(id, left)| (id, left.clone())).collect()
        };
        for (group, unproved) in unproved {
            for (device, registration) in unproved.left {
                if self.has_let_go(device, registration) {
                    self.report(unproved.lease, Request::Proved { group, device, registration });
                }
            }
        }
    }

    fn has_let_go(&self, device: Bdf, since: u64) -> bool {
        // What can't be read shows nothing.
        host::has_let_go(&*self.kernel, device, since) == Ok(true)
    }
}
