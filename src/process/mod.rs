//! Other processes of this program, and what is said to them.
//!
//! The launcher forks them; each has nothing open but standard error and what it is given. A link
//! speaks Varlink, in the framing of the broker's own socket: one call at a time, answered before the
//! next.

pub mod calls;
pub mod holders;
pub mod keeper;
pub mod kept;
pub mod launcher;
pub mod link;
pub mod peer;
pub mod queued_files;
pub mod role;
