//! Open files for VMMs that nobody changed.

mod arguments;
mod error;
mod given;
pub mod interpose;
mod memory;
mod program;
mod slots;

pub use arguments::{Arguments, Placeholder};
pub use error::{Error, Result};
pub use given::Given;
pub use memory::{Need, guest_memory, size_of};
pub use program::find;
pub use slots::Slots;
