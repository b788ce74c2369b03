//! Open files for VMMs that nobody changed.

mod arguments;
mod error;
mod grants;
mod inherit;
pub mod interpose;
mod memory;
mod program;

pub use arguments::{Arguments, Placeholder};
pub use error::{Error, Result};
pub use grants::{Cdevs, Grants};
pub use inherit::InheritedFds;
pub use memory::{Need, guest_memory, size_of};
pub use program::find;
