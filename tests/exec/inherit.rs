//! Programs that inherit the files of a lease.

use super::*;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;

/// What a shell prints of itself with these arguments.
fn shell(broker: &Broker, options: &[&str], arguments: &[&str]) -> String {
    let script =
        "echo $LISTEN_FDS $LISTEN_FDNAMES $((LISTEN_PID - $$)); ls /proc/$$/fd; echo \"$@\"";
    let mut command = exec(broker, &[&["--inherit"], options].concat());
    command.args(["sh", "-c", script, "sh"]).args(arguments);
    let (code, said, error) = run(&mut command);
    assert_eq!(code, 0, "{error}");
    said.replace('\n', " ").trim_end().to_owned()
}

#[test]
fn a_program_has_the_files_of_the_lease_and_no_other() {
    let broker = Broker::start("workstation.toml");
    let said = shell(&broker, &[], &["a{container}b", "{group:03:00.0}", "{lease}", "{{lease}}"]);
    assert_eq!(said, "3 container:group-15:lease 0 0 1 2 3 4 5 a3b 4 5 {lease}");
    // What the arguments name is asked for.
    let said = shell(&broker, &[], &[&format!("{{device:{NIC}}}")]);
    assert_eq!(said, "2 device-0000-03-00.0:lease 0 0 1 2 3 4 3");
    let said = shell(&broker, &["--handout", "group"], &[&format!("{{group:{NIC}}}")]);
    assert_eq!(said, "2 group-15:lease 0 0 1 2 3 4 3");
    no_lease_is_left(&broker);
}

#[test]
fn a_group_is_named_by_its_device_among_several() {
    let broker = Broker::start("workstation.toml");
    let more = ["--device", GPU, "--withhold", AUDIO];
    let groups = [format!("{{group:{GPU}}}"), format!("{{group:{NIC}}}")];
    let said = shell(&broker, &more, &[&groups[0], &groups[1]]);
    let (names, numbers) = (said.split(' ').nth(1).unwrap(), said.split(' ').rev());
    let at = |name: &str| 3 + names.split(':').position(|each| each == name).unwrap();
    let numbers: Vec<usize> = numbers.take(2).map(|number| number.parse().unwrap()).collect();
    assert_eq!(numbers, [at("group-15"), at("group-14")]);
}

#[test]
fn a_file_of_the_callers_own_is_inherited_only_where_it_is_named() {
    let broker = Broker::start("workstation.toml");
    let file = tempfile::tempfile().unwrap();
    let own = nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_DUPFD(40)).unwrap();
    let (mine, number) = (own, own.to_string());
    assert_eq!(shell(&broker, &[], &[]), "3 container:group-15:lease 0 0 1 2 3 4 5");
    let kept = shell(&broker, &["--keep-fd", &number], &[]);
    assert_eq!(kept, format!("3 container:group-15:lease 0 0 1 2 3 4 {number} 5"));
    for bad in ["4", "999"] {
        let (code, _, error) = run(exec(&broker, &["--keep-fd", bad]).arg("true"));
        assert_eq!(code, 2, "{error}");
        assert!(error.contains(&format!("--keep-fd {bad}: ")), "{error}");
    }
    nix::unistd::close(mine).unwrap();
}

#[test]
fn the_lease_lives_as_long_as_the_program() {
    let broker = Broker::start("workstation.toml");
    let mut command = exec(&broker, &["--inherit"]);
    command.args(["sh", "-c", "echo on; cat; true"]);
    let mut program = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = [0; 3];
    program.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
    let held = leases(&broker);
    assert_eq!((held.len(), &held[0]["pid"]), (1, &program.id().into()));
    let input = program.stdin.take();
    program.kill().unwrap();
    assert_eq!(program.wait().unwrap().signal(), Some(9));
    // Its child has the lease too.
    assert_eq!(leases(&broker).len(), 1);
    drop(input);
    no_lease_is_left(&broker);
}

#[test]
fn the_program_takes_the_place_of_the_launcher() {
    let broker = Broker::start("workstation.toml");
    let mut command = exec(&broker, &["--inherit"]);
    let mut program =
        command.args(["cat"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let input = program.stdin.as_mut().unwrap();
    input.write_all(b"x").unwrap();
    program.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    let link = |what: &str| std::fs::read_link(format!("/proc/{}/{what}", program.id())).unwrap();
    assert!(!link("exe").ends_with("vfio-broker"), "{:?}", link("exe"));
    // Its broken pipes and its signals are those that any program has.
    let status = std::fs::read_to_string(format!("/proc/{}/status", program.id())).unwrap();
    let set = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        u64::from_str_radix(line.trim(), 16).unwrap()
    };
    assert_eq!((set("SigBlk:"), set("SigIgn:") & 1 << (13 - 1)), (0, 0), "{status}");
    drop(program.stdin.take());
    assert!(program.wait().unwrap().success());
    no_lease_is_left(&broker);
}

#[test]
fn a_program_that_is_not_there_costs_nothing() {
    let nowhere = Path::new("/nonexistent/broker.sock");
    let say = |program: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vfio-broker"));
        command.arg("--socket").arg(nowhere).args(["exec", "--vm", "v", "--device", NIC, "--"]);
        run(command.arg(program))
    };
    let (code, _, error) = say("no-such-program-anywhere");
    assert_eq!(code, 127, "{error}");
    assert!(error.contains("no-such-program-anywhere: no such program"), "{error}");
    let (code, _, error) = say("/etc/passwd");
    assert_eq!(code, 126, "{error}");
}

#[test]
fn a_program_that_cannot_be_executed_leaves_no_lease() {
    let broker = Broker::start("workstation.toml");
    let directory = tempfile::tempdir().unwrap();
    let script = |name: &str, first: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, first).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        path
    };
    // The kernel says so only when it is executed.
    for (script, status) in
        [(script("a", "#!/no/such/interpreter\n"), 127), (script("b", "#!/etc/passwd\n"), 126)]
    {
        let (code, _, error) = run(exec(&broker, &["--inherit"]).arg(&script));
        assert_eq!(code, status, "{error}");
        assert!(error.contains(script.to_str().unwrap()), "{error}");
        no_lease_is_left(&broker);
    }
}

#[test]
fn placeholders_that_name_nothing_are_found_before_anything_is_acquired() {
    // There is no broker at all.
    let say = |options: &[&str], argument: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vfio-broker"));
        command.args(["--socket", "/nonexistent/broker.sock", "exec", "--vm", "v"]);
        command.args(["--device", NIC]).args(options).args(["--", "true"]);
        run(command.arg(argument))
    };
    for (options, argument, word) in [
        (&[][..], "{iomufd}", "{iomufd} is no placeholder"),
        (&[], "{cdev:0000:99:00.0}", "{cdev:0000:99:00.0} names nothing"),
        (&["--device", NIC], "{group:03:00.0}", "asked for more than once"),
        (&["--handout", "group"], "{container}", "the lease's handout is group"),
        (&["--backend", "type1"], "{iommufd}", "no handout has"),
        (&[], "{iommufd}{container}", "no handout has"),
    ] {
        let (code, _, error) = say(options, argument);
        assert!(code == 1 || code == 2, "{code}: {error}");
        assert!(error.contains(word), "{word:?} is not in {error}");
    }
    assert_eq!(say(&[], "{x").0, 5, "nothing is wrong but that there is no broker");
}

#[test]
fn what_the_broker_refuses_is_said_and_the_program_not_started() {
    let broker = Broker::start("workstation.toml");
    let mut command = vfio_broker(&broker);
    command.args(["exec", "--vm", "v", "--device", "0000:06:00.0", "--", "echo", "started"]);
    let (code, said, error) = run(&mut command);
    assert_eq!((code, &*said), (3, ""), "{error}");
    assert!(error.contains("the host runs from this disk"), "{error}");
}
