//! vfio-broker: a privileged daemon that opens VFIO devices and hands the open file descriptors to
//! unprivileged VMMs, and the client, the typed kernel calls and the simulated kernel that go with
//! it.
//!
//! - [`bdf`]: PCI addresses.
//! - `cli`: the program `vfio-broker` (feature `cli`).
//! - [`client`]: for VMM authors: ask for devices and get their open files.
//! - [`kernel`]: the ioctl layer, typed, with the real Linux behind it.
//! - `daemon`: serves the broker on a socket (feature `daemon`).
//! - `pci`: what a PCI function is (feature `daemon`).
//! - `policy`: who may have what (feature `daemon`).
//! - `holders`: looks for processes that have something open (feature `daemon`).
//! - `host`: what is in this machine (feature `daemon`).
//! - `drivers`: binds devices to drivers (feature `daemon`).
//! - `ledger`: who has what, and the rules of sharing (feature `daemon`).
//! - `broker`: carries the ledger's decisions out on a kernel (feature `daemon`).
//! - `keeper`: has one address space open, in a process of its own (feature `daemon`).
//! - `launcher`: starts the broker and all other processes (feature `daemon`).
//! - `receiver`: receives and closes what peers sent (feature `daemon`).
//! - `process`: other processes of this program, and what is said to them (feature `daemon`).
//! - `users`: the users and groups of this machine (feature `daemon`).
//! - [`qmp`]: a running QEMU's monitor, and devices into it and out of it.
//! - [`protocol`]: what is said on the broker's socket.
//! - [`sim`]: a simulated kernel behind the same layer, for tests.
//! - [`sys`]: system calls that are not about VFIO.
//! - `vmm`: open files for VMMs that nobody changed (feature `cli`).

pub mod bdf;
#[cfg(feature = "daemon")]
pub mod broker;
#[cfg(feature = "cli")]
pub mod cli;
#[cfg(feature = "client")]
pub mod client;
#[cfg(feature = "daemon")]
pub mod daemon;
#[cfg(feature = "daemon")]
pub mod drivers;
#[cfg(feature = "daemon")]
pub mod holders;
#[cfg(feature = "daemon")]
pub mod host;
#[cfg(feature = "daemon")]
pub mod keeper;
pub mod kernel;
#[cfg(feature = "daemon")]
pub mod launcher;
#[cfg(feature = "daemon")]
pub mod ledger;
#[cfg(feature = "daemon")]
mod log;
#[cfg(feature = "daemon")]
pub mod pci;
#[cfg(feature = "daemon")]
pub mod policy;
#[cfg(feature = "daemon")]
pub mod process;
pub mod protocol;
#[cfg(feature = "client")]
pub mod qmp;
#[cfg(feature = "daemon")]
pub mod receiver;
#[cfg(feature = "sim")]
pub mod sim;
pub mod sys;
#[cfg(feature = "daemon")]
pub mod users;
#[cfg(feature = "cli")]
pub mod vmm;

/// The Rust of the pages for users, compiled.
#[cfg(all(doctest, feature = "client"))]
mod pages {
    #[doc = include_str!("../README.md")]
    struct Readme;
    #[doc = include_str!("../docs/client.md")]
    struct Client;
    #[doc = include_str!("../docs/rust-vmm.md")]
    struct RustVmm;
}
