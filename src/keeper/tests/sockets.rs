//! What comes beside a call, and is believed of nobody: sockets with files in their queue, and clients'
//! connections.

use super::*;
use crate::kernel::Mapped;
use crate::process::keeper::{Memlock, Raised};
use nix::sys::resource::{Resource, getrlimit};
use std::fs::File;
use std::thread::JoinHandle;

/// A keeper with a lease that it maps for, and its holder's files.
fn mapping(world: &World) -> (JoinHandle<()>, Asker, Vec<OwnedFd>) {
    let (keeper, [mut link]) = world.keeper();
    link.open(&wanted(ONE, 2, Handout::Devices, false)).unwrap();
    let (_, files) = link.deliver(ONE).unwrap();
    (keeper, link, files)
}

fn memory() -> OwnedFd {
    Mapped::memfd(4096).unwrap().0
}

/// What is wrong with the memory.
fn reason(result: Result<Changed, Failure>) -> String {
    match result {
        Err(Failure::Bad { field, reason }) if field == "memory" => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn memory_that_is_not_in_the_queue_is_not_mapped() {
    let world = World::new();
    let (keeper, mut link, files) = mapping(&world);
    let memory = memory();
    for (queued, index) in [(0, 1), (1, 0), (15, 16), (1, 257), (0, usize::MAX)] {
        let queue = queue(&[(queued, memory.as_fd())]).unwrap();
        let reason = reason(link.map_of(ONE, 0, index, queue.as_fd()));
        assert_eq!(reason, format!("fd {index} is not there"));
    }
    // Nothing was ever in it, or is any more.
    let (empty, other) = UnixStream::pair().unwrap();
    assert_eq!(reason(link.map_of(ONE, 0, 0, empty.as_fd())), "fd 0 is not there");
    drop(other);
    assert_eq!(reason(link.map_of(ONE, 0, 0, empty.as_fd())), "fd 0 is not there");
    let queue = queue(&[(0, memory.as_fd())]).unwrap();
    link.map_of(ONE, 0, 0, queue.as_fd()).unwrap();
    assert_eq!(reason(link.map_of(ONE, 4096, 0, queue.as_fd())), "fd 0 is not there");
    // Not even a queue.
    let failure = link.map_of(ONE, 4096, 0, memory.as_fd()).unwrap_err();
    assert_eq!(failure.errno(), Some(Errno::ENOTSOCK));
    assert_eq!(world.stats().spaces[0].mappings, 1);
    drop((link, files));
    world.is_over(keeper);
}

#[test]
fn a_file_in_the_queue_that_is_no_memory_is_not_mapped() {
    let world = World::new();
    let (keeper, mut link, files) = mapping(&world);
    let (socket, _other) = UnixStream::pair().unwrap();
    let (null, memory) = (File::open("/dev/null").unwrap(), memory());
    let all = [(0, null.as_fd()), (1, memory.as_fd()), (2, socket.as_fd())];
    let mut map = |index| {
        let queue = queue(&all).unwrap();
        link.map_of(ONE, 0, index, queue.as_fd())
    };
    assert!(reason(map(0)).starts_with("/dev/null is not"));
    assert!(reason(map(2)).starts_with("socket:"));
    map(1).unwrap();
    // More than a message of a client's may have.
    let too_many = vec![memory.as_fd(); 17];
    let (ours, theirs) = UnixStream::pair().unwrap();
    fdpass::send(ours.as_fd(), &[0; 17], &too_many, MsgFlags::empty()).unwrap();
    assert!(reason(link.map_of(ONE, 4096, 0, theirs.as_fd())).contains("more than 16"));
    assert_eq!(world.stats().spaces[0].mappings, 1);
    drop((link, files));
    world.is_over(keeper);
}

#[test]
fn the_files_beside_the_one_that_is_mapped_are_closed() {
    let world = World::new();
    let (keeper, mut link, files) = mapping(&world);
    let (read_end, write_end) = nix::unistd::pipe().unwrap();
    let memory = memory();
    let queue = queue(&[(0, read_end.as_fd()), (1, memory.as_fd())]).unwrap();
    drop(read_end);
    link.map_of(ONE, 0, 1, queue.as_fd()).unwrap();
    assert_eq!(nix::unistd::write(&write_end, b"x"), Err(Errno::EPIPE));
    drop((link, files));
    world.is_over(keeper);
}

#[test]
fn the_limit_of_the_process_that_made_the_connection_is_raised() {
    let world = World::new();
    let (keeper, mut link, files) = mapping(&world);
    let mut raise = |lease: &str, client: BorrowedFd<'_>| {
        // It never gets lower, so that this only asks.
        link.send(&Memlock { lease: lease.into(), bytes: 0 }, &[client]);
        link.answer::<Memlock>()
    };
    let (client, _theirs) = UnixStream::pair().unwrap();
    let (own, _) = getrlimit(Resource::RLIMIT_MEMLOCK).unwrap();
    match raise(ONE, client.as_fd()) {
        Ok(Raised { bytes }) => assert_eq!(bytes, own),
        // Before Linux 6.5.
        Err(failure) => assert_eq!(failure, Failure::UnknownPeer),
    }
    assert_eq!(raise(OTHER, client.as_fd()).unwrap_err(), Failure::NoSuchLease);
    let null = File::open("/dev/null").unwrap();
    assert_eq!(raise(ONE, null.as_fd()).unwrap_err().errno(), Some(Errno::ENOTSOCK));
    drop((link, files));
    world.is_over(keeper);
}
