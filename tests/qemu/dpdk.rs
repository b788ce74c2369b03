//! DPDK that nobody changed, under the interposer: `VFIO_TESTPMD` is its dpdk-testpmd, or what
//! `tests/lab/dpdk` prints.

use crate::story::ENOUGH;
use crate::world::*;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

pub fn sends(world: &World) {
    let Some(testpmd) = std::env::var_os("VFIO_TESTPMD") else {
        println!("    SKIPPED: VFIO_TESTPMD is not set: see tests/lab/dpdk");
        return;
    };
    let command = |handout| {
        let mut command = world.exec(&["--handout", handout], ENOUGH);
        command.env("XDG_RUNTIME_DIR", world.runtime()).stdin(Stdio::piped());
        // What it says is to come at once.
        command.args(["stdbuf", "-oL"]).arg(&testpmd);
        command.args(["--no-huge", "-m", "64", "-l", "0,1", "-a", NIC]);
        command.args(["--", "-i", "--total-num-mbufs=4096"]);
        command
    };
    let sent = sent(command("group"));
    println!("    the card has sent {sent} packets");

    // It wants the first version of type 1, and the broker has set the second: it says so, and does
    // not go on as if somebody else had mapped its memory.
    let output = command("container").stdin(Stdio::null()).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("failed to select IOMMU type"), "the guide says so: {error}");
}

/// Has it send packets until the card itself has counted some: it has read them from memory then.
fn sent(mut command: Command) -> u64 {
    let mut testpmd = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut input = testpmd.stdin.take().unwrap();
    let mut output = BufReader::new(testpmd.stdout.take().unwrap()).lines();
    write!(input, "set fwd txonly\nstart\n").unwrap();
    let mut sent = 0;
    until("the card has sent something", || {
        writeln!(input, "show port stats 0").unwrap();
        let line = output.find_map(|line| {
            let line = line.expect("it has ended");
            let (_, rest) = line.split_once("TX-packets:")?;
            rest.split_whitespace().next()?.parse().ok()
        });
        sent = line.expect("it has ended");
        sent > 0
    });
    write!(input, "stop\nquit\n").unwrap();
    for line in output {
        drop(line);
    }
    assert_eq!(testpmd.wait().unwrap().code(), Some(0));
    sent
}
