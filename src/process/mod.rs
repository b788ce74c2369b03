//! Other processes of this program, and what is said to them.
//!
//! A process is this program again, started under another name, with nothing of its parent's but the
//! links it is given. A link speaks Varlink, in the framing of the broker's own socket: one call at a
//! time, answered before the next.

pub mod keeper;
pub mod link;
pub mod queued_files;
