//! The daemon as a process: how it starts and ends, how it serves calls, and what keeps a lease.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests, too

mod calls;
mod cgroups;
#[path = "../common/mod.rs"]
mod common;
mod confined;
mod contested;
mod files;
mod full;
mod iommufd;
mod leases;
mod left;
mod lifecycle;
mod limits;
mod links;
mod log;
mod neighbours;
mod processes;
mod reload;
mod resources;
mod restart;
mod revoking;
mod status;
mod watching;

/// The device that a test uses, beside the neighbour's.
const DEVICE: &str = "0000:65:00.0";
