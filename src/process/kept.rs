//! What keepers last wrote down, as the launcher gives it to the broker: many keepers in one file, each as
//! a line that says how many bytes of its state file stand behind it. The launcher copies these and does
//! not read them.

use super::keeper::{LeaseState, Saved, VERSION};
use serde::{Deserialize, Serialize};
use std::io::{Error, ErrorKind, Result};

/// What one keeper last wrote down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptKeeper {
    /// Its name.
    pub name: String,
    /// Where its state file is.
    pub path: String,
    /// Its process has its files still, whatever else is the matter with it.
    pub is_alive: bool,
    /// Its state file, none where it has never had anything; or why that can't be read.
    pub state: std::result::Result<Option<Vec<u8>>, String>,
}

/// The same, understood.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SavedKeeper {
    /// Its process; 0 where it has not written that down yet.
    pub pid: u32,
    /// Its leases.
    pub leases: Vec<LeaseState>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Heading {
    name: String,
    path: String,
    alive: bool,
    bytes: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    unusable: Option<String>,
}

impl KeptKeeper {
    /// What it says.
    ///
    /// # Errors
    /// It can't be relied on; why.
    pub fn saved(&self) -> std::result::Result<SavedKeeper, String> {
        let unusable = |why: &str| format!("{}: {why}", self.path);
        let state = self.state.as_ref().map_err(|why| unusable(why))?;
        let Some(state) = state else { return Ok(SavedKeeper::default()) };
        let saved = serde_json::from_slice::<Saved>(state);
        let Saved { version, pid, leases, .. } =
            saved.map_err(|error| unusable(&error.to_string()))?;
        match version {
            0..=VERSION => Ok(SavedKeeper { pid, leases }),
            newer => {
                Err(unusable(&format!("of version {newer}; this daemon understands {VERSION}")))
            }
        }
    }

    /// Puts it behind others.
    pub fn append_to(&self, all: &mut Vec<u8>) {
        let (state, unusable) = match &self.state {
            Ok(state) => (state.as_deref(), None),
            Err(why) => (None, Some(why.clone())),
        };
        let (name, path) = (self.name.clone(), self.path.clone());
        let heading =
            Heading { name, path, alive: self.is_alive, bytes: state.map(<[u8]>::len), unusable };
        // It has string keys and no floats: it can be written as JSON.
        all.extend(serde_json::to_vec(&heading).unwrap_or_default());
        all.push(b'\n');
        all.extend(state.unwrap_or_default());
    }
}

/// Takes apart what [`KeptKeeper::append_to`] has put together.
///
/// # Errors
/// It is something else, or a part of it.
pub fn parse(mut all: &[u8]) -> Result<Vec<KeptKeeper>> {
    let cut = || Error::new(ErrorKind::InvalidData, "what keepers have written came in part");
    let mut keepers = Vec::new();
    while !all.is_empty() {
        let end = all.iter().position(|byte| *byte == b'\n').ok_or_else(cut)?;
        let Heading { name, path, alive, bytes, unusable } = serde_json::from_slice(&all[..end])?;
        let behind = &all[end + 1..];
        let (state, rest) = behind.split_at_checked(bytes.unwrap_or(0)).ok_or_else(cut)?;
        let state = unusable.map_or_else(|| Ok(bytes.map(|_| state.to_vec())), Err);
        keepers.push(KeptKeeper { name, path, is_alive: alive, state });
        all = rest;
    }
    Ok(keepers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn keeper() -> impl Strategy<Value = KeptKeeper> {
        let bytes = prop::collection::vec(any::<u8>(), 0..50);
        let state = proptest::result::maybe_ok(proptest::option::of(bytes), ".*");
        ("[0-9a-f]{1,16}", ".*", any::<bool>(), state)
            .prop_map(|(name, path, is_alive, state)| KeptKeeper { name, path, is_alive, state })
    }

    proptest! {
        #[test]
        fn what_is_put_together_comes_apart_again_and_no_part_of_it_does(
            keepers in prop::collection::vec(keeper(), 1..5)
        ) {
            let mut all = Vec::new();
            let mut whole = vec![0];
            for keeper in &keepers {
                keeper.append_to(&mut all);
                whole.push(all.len());
            }
            prop_assert_eq!(&parse(&all).unwrap(), &keepers);
            for cut in 0..all.len() {
                prop_assert_eq!(parse(&all[..cut]).is_ok(), whole.contains(&cut));
            }
        }

        #[test]
        fn garbage_is_no_keeper_and_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = parse(&bytes);
            let (name, path) = ("1".into(), "1/state".into());
            let _ = KeptKeeper { name, path, is_alive: true, state: Ok(Some(bytes)) }.saved();
        }
    }
}
