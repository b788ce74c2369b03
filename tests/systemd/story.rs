//! The steps, each of which finds what the one before has left.

use crate::guest::{EDU, NIC};
use crate::world::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use vfio_broker::client::{Acquire, Client};
use vfio_broker::protocol::Handout;

type Step = fn(&mut World);

pub const STEPS: [(&str, Step); 13] = [
    ("systemd has nothing to say against the units", units_are_clean),
    ("the first client starts the daemon", the_first_client_starts_it),
    ("who is not in the group is not heard", strangers_are_not_heard),
    ("a device is bound again under the unit's sandbox", drivers_can_be_bound),
    ("a restart leaves leases alone", restarts),
    ("a changed policy is read under leases", reloads),
    ("a daemon that is killed is started again, however often", is_killed),
    ("a broker that is killed alone is started again", its_broker_is_killed),
    ("a daemon that stands still is started again", stands_still),
    ("the program is replaced under leases", is_upgraded),
    ("without a policy it stays away until there is one", has_no_policy),
    ("stopped, it leaves leases alone; the next client starts it", is_stopped),
    ("disabled, it leaves leases alone, and what ends meanwhile is free afterwards", is_disabled),
];

/// The most that `systemd-analyze security` may say, of 100: what root's processes with devices need
/// is not nothing.
const MOST_EXPOSED: &str = "30";

fn units_are_clean(_: &mut World) {
    let units = [SERVICE, SOCKET].map(|unit| format!("{UNITS}/{unit}"));
    let output = run("systemd-analyze", &["verify", "--man=no", &units[0], &units[1]]);
    let said = [output.stdout, output.stderr].concat();
    assert!(said.is_empty(), "{}", String::from_utf8_lossy(&said));
    let offline = ["--offline=yes", "--threshold", MOST_EXPOSED];
    let arguments = [&["security", "--no-pager"], &offline[..], &[&units[0]]].concat();
    let said = String::from_utf8(run("systemd-analyze", &arguments).stdout).unwrap();
    for line in said.lines().filter(|line| !line.starts_with('✓')) {
        println!("    {line}");
    }
}

fn the_first_client_starts_it(world: &mut World) {
    run("systemctl", &["enable", "--now", SOCKET]);
    assert_eq!(property("ActiveState"), "inactive");
    assert!(leases().is_empty());
    assert_eq!(property("ActiveState"), "active");
    let socket = fs::metadata("/run/vfio-broker/broker.sock").unwrap();
    assert_eq!(socket.mode() & 0o777, 0o660);
    world.acquire();
    world.leases_are_known();
    assert_eq!(keepers().len(), 2);
}

fn strangers_are_not_heard(_: &mut World) {
    let asks = |groups| {
        let output = user(groups).args(["vfio-broker", "leases"]).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.success(), error)
    };
    assert!(asks("vfio-clients").0);
    let (heard, error) = asks("nogroup");
    assert!(!heard && error.contains("Permission denied"), "{error}");
    println!("    {}", error.trim());
}

fn drivers_can_be_bound(_: &mut World) {
    takes_and_gives_back(Handout::Container);
    if Path::new("/dev/iommu").exists() {
        takes_and_gives_back(Handout::Iommufd);
    }
}

fn restarts(world: &mut World) {
    let (daemon, before) = (main_pid(), keepers());
    run("systemctl", &["restart", SERVICE]);
    assert_ne!(main_pid(), daemon);
    assert_eq!(keepers(), before);
    world.leases_are_known();
    takes_and_gives_back(Handout::Container);
    // Nor does systemd's own upgrade do anything to them.
    run("systemctl", &["daemon-reexec"]);
    world.leases_are_known();
    takes_and_gives_back(Handout::Container);
    // With its socket it is the same.
    run("systemctl", &["restart", SOCKET]);
    world.leases_are_known();
    assert_eq!(keepers(), before);
}

fn reloads(world: &mut World) {
    let (daemon, rules) = (main_pid(), fs::read_to_string(POLICY).unwrap());
    let spare = || {
        let order = Acquire::new("spare").device(SPARE);
        Client::connect().unwrap().acquire(order)
    };
    let reload = |rules: &str| {
        fs::write(POLICY, rules).unwrap();
        run("systemctl", &["reload", SERVICE]);
    };
    reload(&format!("{rules}\n[[deny]]\ndevices = [\"{SPARE}\"]\nreason = \"resting\"\n"));
    let refused = spare().unwrap_err().to_string();
    assert!(refused.contains("resting"), "{refused}");
    // One that can't be read changes nothing.
    reload("version = what");
    assert_eq!(spare().unwrap_err().to_string(), refused);
    assert!(journal().contains("policy refused"));
    reload(&rules);
    drop(spare().unwrap());
    is_free(SPARE);
    world.leases_are_known();
    assert_eq!(main_pid(), daemon);
}

fn is_killed(world: &mut World) {
    let before = keepers();
    // More often than systemd's default of five times in ten seconds.
    for _ in 0..6 {
        let daemon = main_pid();
        kill(Pid::from_raw(daemon), Signal::SIGKILL).unwrap();
        // Who asks meanwhile waits for the next one.
        assert_eq!(leases().len(), 2);
        is_another_than(daemon);
    }
    world.leases_are_known();
    assert_eq!(keepers(), before);
}

fn its_broker_is_killed(world: &mut World) {
    let broker = broker().expect("a process of the broker's user");
    let status = fs::read_to_string(format!("/proc/{broker}/status")).unwrap();
    assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
    let before = keepers();
    kill(Pid::from_raw(broker), Signal::SIGKILL).unwrap();
    assert_eq!(leases().len(), 2);
    until("there is another broker", || ![None, Some(broker)].contains(&self::broker()));
    world.leases_are_known();
    assert_eq!(keepers(), before);
    takes_and_gives_back(Handout::Container);
}

fn stands_still(world: &mut World) {
    let directory = Path::new("/run/systemd/system/vfio-broker.service.d");
    fs::create_dir_all(directory).unwrap();
    fs::write(directory.join("watchdog.conf"), "[Service]\nWatchdogSec=6s\n").unwrap();
    run("systemctl", &["daemon-reload"]);
    run("systemctl", &["restart", SERVICE]);
    let daemon = main_pid();
    kill(Pid::from_raw(daemon), Signal::SIGSTOP).unwrap();
    is_another_than(daemon);
    fs::remove_dir_all(directory).unwrap();
    run("systemctl", &["daemon-reload"]);
    run("systemctl", &["restart", SERVICE]);
    world.leases_are_known();
}

fn is_upgraded(world: &mut World) {
    let program = Path::new(PROGRAMS).join("vfio-brokerd");
    let running = || fs::metadata(format!("/proc/{}/exe", main_pid())).unwrap().ino();
    let (old, before) = (running(), keepers());
    put(&program, &program, 0o755);
    // Until it is restarted it goes on as the old one, new keepers too.
    takes_and_gives_back(Handout::Container);
    assert_eq!(running(), old);
    run("systemctl", &["restart", SERVICE]);
    assert_ne!(running(), old);
    assert_eq!(keepers(), before);
    world.leases_are_known();
    takes_and_gives_back(Handout::Container);
}

fn has_no_policy(world: &mut World) {
    let aside = format!("{POLICY}.aside");
    fs::rename(POLICY, &aside).unwrap();
    run("systemctl", &["stop", SERVICE]);
    // Waits in the socket while the daemon tries, and is answered by one that has a policy.
    let mut broker = Client::connect().unwrap();
    broker.set_timeout(None);
    let waiting = std::thread::spawn(move || broker.leases().unwrap().len());
    until("it has been tried again", || property("NRestarts").parse::<u32>().unwrap() > 2);
    fs::rename(aside, POLICY).unwrap();
    assert_eq!(waiting.join().unwrap(), 2);
    world.leases_are_known();
}

fn is_stopped(world: &mut World) {
    let before = keepers();
    run("systemctl", &["stop", SERVICE]);
    assert_eq!(property("ActiveState"), "inactive");
    world.holders_have_all();
    assert_eq!(keepers(), before);
    world.leases_are_known();
    assert_eq!(property("ActiveState"), "active");
    takes_and_gives_back(Handout::Container);
}

fn is_disabled(world: &mut World) {
    run("systemctl", &["disable", "--now", SERVICE, SOCKET]);
    assert_eq!(property("ActiveState"), "inactive");
    assert!(Client::connect().is_err(), "somebody listens");
    world.holders_have_all();
    world.release();
    // Taking back opens the groups once more, in the sandbox of a service that is no more.
    until("the keepers have taken back what they had", || keepers().is_empty());
    run("systemctl", &["enable", "--now", SERVICE]);
    assert!(leases().is_empty());
    [NIC, EDU, SPARE].into_iter().for_each(is_free);
    takes_and_gives_back(Handout::Container);
}
