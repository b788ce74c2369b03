//! Clients that come and go, each a process of its own, so that it can die.

use crate::daemon::Daemon;
use crate::dice::Dice;
use crate::{EDU0, PAIR, VF, client};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

pub struct Load {
    socket: PathBuf,
    directory: PathBuf,
    devices: Vec<&'static str>,
    has_iommufd: bool,
    wanted: usize,
    /// What was done, and how often.
    done: Mutex<BTreeMap<String, usize>>,
    failed: Mutex<Option<String>>,
}

impl Load {
    pub fn new(daemon: &Daemon, wanted: usize) -> Self {
        let mut devices = vec![PAIR[0], PAIR[1], VF];
        if !daemon.has_iommufd {
            devices.push(EDU0);
        }
        for device in &devices {
            client::make_lock(daemon.directory(), device);
        }
        Self {
            socket: daemon.socket(),
            directory: daemon.directory().to_owned(),
            devices,
            has_iommufd: daemon.has_iommufd,
            wanted,
            done: Mutex::default(),
            failed: Mutex::default(),
        }
    }

    /// Whether enough was done, or something has gone wrong.
    pub fn is_over(&self) -> bool {
        self.failed.lock().unwrap().is_some() || self.done() >= self.wanted
    }

    /// How many operations there were.
    pub fn done(&self) -> usize {
        self.done.lock().unwrap().values().sum()
    }

    /// Whether leases were given and used, and nobody was wronged.
    pub fn had_enough(&self) -> bool {
        if let Some(failed) = &*self.failed.lock().unwrap() {
            panic!("{failed}");
        }
        let done = self.done.lock().unwrap();
        ["acquire", "map", "release"].iter().all(|it| done.get(*it).is_some_and(|count| *count > 0))
    }

    pub fn fails(&self, why: String) {
        self.failed.lock().unwrap().get_or_insert(why);
    }

    pub fn tally(&self) -> String {
        let done = self.done.lock().unwrap();
        let each: Vec<_> = done.iter().map(|(what, count)| format!("{what}: {count}")).collect();
        each.join(", ")
    }

    /// One client after the other, until it is over.
    pub fn run(&self, number: u32, mut dice: Dice) {
        while !self.is_over() {
            if let Err(error) = self.one_client(2002 + number % 2, &mut dice) {
                self.fails(error);
            }
        }
    }

    /// Starts a client, which ends by itself or is killed.
    fn one_client(&self, uid: u32, dice: &mut Dice) -> Result<(), String> {
        let mut command = Command::new("/proc/self/exe");
        command.arg(client::FLAG).arg(dice.next().to_string());
        command.arg(if self.has_iommufd { "iommufd" } else { "groups" });
        command.arg(&self.directory).args(&self.devices);
        command.env("VFIO_BROKER_SOCKET", &self.socket).uid(uid).gid(uid).current_dir("/");
        let mut process = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut left = dice.below(12);
        let (mut is_killed, mut failed) = (false, None);
        for line in BufReader::new(process.stdout.take().unwrap()).lines() {
            let line = line.unwrap();
            if let Some(why) = line.strip_prefix(client::FAILED) {
                failed = Some(format!("{why} (client {} of {uid})", process.id()));
                continue;
            }
            *self.done.lock().unwrap().entry(line).or_default() += 1;
            left = left.saturating_sub(1);
            if left == 0 && !is_killed {
                // In the midst of what it does next.
                std::thread::sleep(Duration::from_millis(dice.below(40)));
                let _ = process.kill();
                is_killed = true;
                *self.done.lock().unwrap().entry("die".into()).or_default() += 1;
            }
        }
        let ended = process.wait().unwrap();
        match failed {
            Some(failed) => Err(failed),
            None if ended.success() || is_killed => Ok(()),
            None => Err(format!("a client ended with {ended}")),
        }
    }
}
