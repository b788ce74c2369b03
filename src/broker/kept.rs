//! All keepers, by what they last wrote down.

use super::attend::started;
use super::{Broker, Keepers};
use crate::process::kept::KeptKeeper;
use crate::protocol::Error;

/// Keepers in the order of their names, read in pages.
pub struct KeptKeepers<'a> {
    keepers: &'a dyn Keepers,
    page: std::vec::IntoIter<KeptKeeper>,
    last: String,
}

impl Broker {
    /// All that may have something.
    pub fn kept(&self) -> KeptKeepers<'_> {
        let page = Vec::new().into_iter();
        KeptKeepers { keepers: &*self.keepers, page, last: String::new() }
    }
}

impl KeptKeepers<'_> {
    /// The next; none at the end.
    ///
    /// # Errors
    /// The launcher can't tell.
    pub async fn next(&mut self) -> Result<Option<KeptKeeper>, Error> {
        if self.page.len() == 0 {
            let page = self.keepers.kept(&self.last).await;
            let page = page.map_err(|error| started("read", "what keepers have", &error))?;
            self.last = page.last().map_or(String::new(), |keeper| keeper.name.clone());
            self.page = page.into_iter();
        }
        Ok(self.page.next())
    }
}
