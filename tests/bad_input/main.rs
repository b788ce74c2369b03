//! What bad input gets: a typed error or a disconnect. Each test also shows that a well-behaved
//! client beside it noticed nothing, and that the daemon's open files are back to where they were:
//! see [`common::beside`].

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;

mod connections;
mod files;
mod framing;
mod iommufd;
mod leases;
mod mapping;
mod memlock;
mod requests;

use common::Held;
use common::raw::Raw;
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde_json::{Value, json};
use std::os::fd::OwnedFd;

const DEVICE: &str = "0000:65:00.0";
const PAGE: u64 = 4096;

fn memory(size: u64) -> OwnedFd {
    let fd = memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap();
    nix::unistd::ftruncate(&fd, size as i64).unwrap();
    fd
}

fn map(lease: &Held, memory: usize, iova: u64, size: u64) -> Value {
    lease.with(json!({
        "iova": iova, "size": size, "read": true, "write": true, "memory": memory, "offset": 0,
    }))
}

fn is_free(client: &mut Raw, device: &str) -> bool {
    let (topology, _) = client.call("Topology", json!({})).ok();
    let groups = topology["groups"].as_array().unwrap();
    let group = groups.iter().find(|group| group["devices"][0]["bdf"] == device).unwrap();
    group["state"] == "free"
}
