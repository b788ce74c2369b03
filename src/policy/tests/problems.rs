//! What is wrong with a file, and that it is shown in the right place.

use super::{good, parse};
use crate::policy::{Problems, Severity};

fn bad(text: &str) -> Problems {
    parse(text).expect_err(text)
}

/// A file of one tenant, for root, whose line 5 is `line`.
fn with(line: &str) -> String {
    let has = |key: &str| line.starts_with(key);
    let who = if ["user", "group", "unit", "label", "anyone"].iter().any(|key| has(key)) {
        ""
    } else {
        "user = 0"
    };
    let rights = if has("devices") || has("rights") { "" } else { "rights = [\"observe\"]" };
    format!("version = 1\n[[tenant]]\nname = \"t\"\n{who}\n{line}\n{rights}\n")
}

#[test]
fn a_problem_is_shown_with_its_line_a_caret_and_help() {
    let text = "version = 1\n\n[[tenant]]\nname = \"é\"\n\tusr = \"root\"  # who\n";
    let problems = bad(text).to_string();
    let usr = "error: a tenant has no key `usr`
 --> /etc/vfio-broker/policy.toml:5:2
  |
5 | \tusr = \"root\"  # who
  | \t^^^
  = help: did you mean `user`?";
    assert!(problems.contains(usr), "{problems}");
    let name = "error: \"é\" can't be a name
 --> /etc/vfio-broker/policy.toml:4:8
  |
4 | name = \"é\"
  |        ^^^
  = help: a name is 1 to 64 of A-Z a-z 0-9 - _ .";
    assert!(problems.contains(name), "{problems}");
}

#[test]
fn a_key_that_is_misspelt_is_not_missing_too() {
    let text = "verison = 1\n[[tenant]]\nnaem = \"t\"\nuid = 0\ndevcies = [\"8086:10d3\"]\n[[container]]\nname = \"c\"\nmember = [\"t\"]\n[[deny]]\ndevice = []\nraeson = \"x\"\n";
    let problems = bad(text);
    assert_eq!(problems.count(Severity::Error), 7, "{problems}");
    assert!(problems.iter().all(|problem| problem.message.contains("has no key")), "{problems}");
}

#[test]
fn control_characters_are_not_shown_as_they_are() {
    let problems = bad("version = 1\nx = 1 # \u{1b}[2J\u{7f}").to_string();
    assert!(!problems.contains(['\u{1b}', '\u{7f}']), "{problems:?}");
}

/// Each: line 5 of the file, where in it the caret is, how long it is, words of the message, words
/// of the help.
#[test]
fn mistakes_are_found_where_they_are() {
    let cases = [
        ("user = \"alcie\"", 8, 7, "no user \"alcie\"", "check the spelling"),
        ("user = \"1000\"", 8, 6, "no user \"1000\"", "without quotes"),
        ("user = [0, 0]", 12, 1, "uid 0 is listed twice", ""),
        ("user = 4294967295", 8, 10, "can't be a user's number", ""),
        ("user = -1", 8, 2, "whole number", ""),
        ("user = 1.5", 8, 3, "not a float", ""),
        ("user = []", 8, 2, "empty", "at least one"),
        ("user = 65534", 8, 5, "65534 is not one user", "overflow-uid"),
        ("user = \"nobody\"", 8, 8, "65534 is not one user", "overflow-uid"),
        ("group = \"nogroup\"", 9, 9, "65534 is not one group", ""),
        ("group = \"qemu\"", 9, 6, "no group \"qemu\"", ""),
        ("unit = \"libvirtd\"", 8, 10, "can't be a unit", "libvirtd.service"),
        ("unit = \"*.service\"", 8, 11, "can't be a unit", "no patterns"),
        ("label = \"svirt_t\"", 9, 9, "can't be a label", "user:role:type"),
        ("label = \"a:b:\"", 9, 6, "can't be a label", ""),
        ("unit = [\"é.service\", \"x\"]", 22, 3, "can't be a unit", ""),
        ("anyone = false", 10, 5, "says nothing", "leave it out"),
        ("rights = [\"aquire\"]", 11, 8, "can't be \"aquire\"", "`acquire`"),
        ("rights = [\"observe\", \"observe\"]", 22, 9, "twice", ""),
        ("rights = \"observe\"", 10, 9, "rights must be a list", ""),
        ("rights = []", 10, 2, "empty", ""),
        ("devices = []", 11, 2, "empty", ""),
        ("devices = [\"65:00.0\"]", 12, 9, "names no device", "\"0000:65:00.0\""),
        ("devices = [\"8086\"]", 12, 6, "names no device", "8086:10d3"),
        ("devices = [1]", 12, 1, "a string or a table", ""),
        ("devices = [{}]", 12, 2, "does not name a device", "only narrow"),
        ("devices = [{ serial = \"00-00-00-00-00-00-00-00\" }]", 12, 38, "does not name", ""),
        ("devices = [{ id = \"8086:10d3\", serial = \"1\" }]", 41, 3, "serial number", "lspci"),
        ("devices = [{ bdf = \"0000:65:00\" }]", 20, 12, "not a PCI address", ""),
        ("devices = [{ vf_of = \"3b:00.0\" }]", 22, 9, "not a PCI address", "0000:3b:00.0"),
        ("devices = [{ id = \"8086:x\" }]", 19, 8, "not two PCI ids", ""),
        ("devices = [{ bfd = \"x\" }]", 14, 3, "no key `bfd`", "`bdf`"),
        ("devices = [{ vendor = \"8086\" }]", 14, 6, "no key `vendor`", "`id ="),
        (
            "devices = [{ bdf = \"0000:65:00.0\", vf_of = \"0000:65:00.0\" }]",
            12,
            48,
            "either bdf or vf_of",
            "its own bdf",
        ),
        (
            "deny = [{ bdf = \"0000:65:00.0\", id = \"8086:10d3\" }]",
            9,
            42,
            "whatever is there",
            "deny by id",
        ),
        ("handouts = [\"containers\"]", 13, 12, "can't be", "`container`"),
        ("backends = [\"type2\"]", 13, 7, "can't be", "`type1`"),
        ("managed = 1", 11, 1, "true or false", ""),
        ("memlock = \"1GB\"", 11, 5, "must be a size", "GiB"),
        ("memlock = \"99999999TiB\"", 11, 13, "must be a size", ""),
        ("memlock = \"GiB\"", 11, 5, "must be a size", ""),
        ("accept = [\"no_iommu\"]", 11, 10, "can't be", "`no-iommu`"),
        ("accept = [\"overflow-uid\"]", 10, 16, "no user is 65534", "user = 65534"),
        ("limits = 3", 10, 1, "must be a table", ""),
        ("limits = { connections = 0 }", 26, 1, "at least 1", ""),
        ("limits = { mapping = 1 }", 12, 7, "no key `mapping`", "`mappings`"),
        ("containers = [\"x\"]", 1, 10, "no key `containers`", "[[container]] members"),
        ("new_id = true", 1, 6, "no key `new_id`", "never written"),
    ];
    for (line, column, length, message, help) in cases {
        let problems = bad(&with(line));
        let found = problems.iter().any(|problem| {
            let at = (problem.line, problem.column, problem.length) == (5, column, length);
            let helps = problem.help.as_deref().unwrap_or_default().contains(help);
            at && problem.message.contains(message) && helps && problem.source == line
        });
        assert!(found, "{line}\n{problems}");
        assert_eq!(problems.count(Severity::Error), 1, "{line}\n{problems}");
    }
}

#[test]
fn all_mistakes_are_found_in_one_go_in_the_order_of_the_file() {
    let problems = bad(r#"
[[tenant]]
user = "alcie"
rights = ["aquire"]
[[container]]
name = "pool"
members = ["b"]
[[deny]]
reason = ""
"#);
    let places: Vec<_> = problems.iter().map(|p| (p.line, p.message.as_str())).collect();
    assert_eq!(
        places,
        [
            (1, "the file does not say its version"),
            (2, "a tenant needs a name"),
            (3, "there is no user \"alcie\" on this machine"),
            (4, "an entry of rights can't be \"aquire\""),
            (7, "there is no tenant \"b\""),
            (8, "this deny names no devices"),
            (8, "this deny gives no reason"),
        ]
    );
}

#[test]
fn what_is_not_toml_says_where() {
    let problems = bad("version = 1\nname = \nother = ]\nname = 2\n");
    let lines: Vec<_> = problems.iter().map(|problem| problem.line).collect();
    assert_eq!(lines, [2, 3, 4], "{problems}");
    let problems = bad(&format!("a = {}", "[".repeat(100_000)));
    assert!(!problems.is_empty());
}

#[test]
fn the_overflow_uid_is_written_as_a_number() {
    let problems = bad(&with("user = \"nobody\"\naccept = [\"overflow-uid\"]"));
    assert!(problems.to_string().contains("65534 is not one user"), "{problems}");
}

#[test]
fn tables_are_lists_of_tables() {
    let problems = bad("version = 1\n[tenant]\nname = \"t\"\n");
    let problem = problems.iter().next().unwrap();
    assert_eq!(
        (problem.line, problem.help.as_deref()),
        (2, Some("write [[tenant]], with two brackets"))
    );
    for text in
        ["version = 1\ntenant = 1", "version = 1\ntenant = [1]", "version = \"1\"", "version = 2"]
    {
        assert_eq!(bad(text).count(Severity::Error), 1, "{text}");
    }
}

/// Tenants by their matchers, in order; then how the last is told that it can't be.
#[test]
fn a_tenant_that_nobody_can_be_is_an_error() {
    let file = |tenants: &[&str]| {
        let each = tenants.iter().enumerate().map(|(at, who)| {
            format!("[[tenant]]\nname = \"t{at}\"\nrights = [\"observe\"]\n{who}\n")
        });
        format!("version = 1\n{}", each.collect::<String>())
    };
    let never: [&[&str]; 9] = [
        &["user = 1000", "user = 1000"],
        &["user = 1000", "user = 1000\nunit = \"vm.service\""],
        &["user = [1000, 1001]", "user = \"bob\""],
        &["user = 1000", "user = 1001", "user = [1000, 1001]"],
        &["group = 36", "group = \"kvm\"\nuser = 1000"],
        &["unit = [\"a.service\", \"b.service\"]", "unit = \"b.service\""],
        &["label = \"a:b:c\"", "label = \"a:b:c:s0\""],
        &["anyone = true", "user = 1000"],
        &["anyone = true", "anyone = true"],
    ];
    for tenants in never {
        let problems = bad(&file(tenants)).to_string();
        let name = format!("nobody can be tenant \"t{}\"", tenants.len() - 1);
        assert!(problems.contains(&name), "{tenants:?}\n{problems}");
    }
    let fine: [&[&str]; 7] = [
        &["user = 1000\nunit = \"vm.service\"", "user = 1000"],
        &["user = 1000", "group = 36"],
        &["group = 36", "user = 1000"],
        &["label = \"a:b:c:s0\"", "label = \"a:b:c\""],
        &["label = \"a:b:c\"", "label = \"a:b:cd\""],
        &["anyone = true", "user = 65534\naccept = [\"overflow-uid\"]"],
        &["user = 1000", "anyone = true"],
    ];
    for tenants in fine {
        let policy = good(&file(tenants));
        let warnings = policy.warnings().iter().filter(|w| !w.message.contains("every process"));
        assert_eq!(warnings.count(), 0, "{tenants:?}\n{}", policy.warnings());
    }
    let policy = good(&file(&["user = 1000", "user = [1000, 1001]"]));
    let warning = policy.warnings().iter().next().unwrap();
    assert_eq!(warning.message, "uid 1000 is always tenant \"t0\", never \"t1\"");
    assert_eq!((warning.line, warning.column), (9, 9));
}

#[test]
fn names_are_there_once_and_members_are_tenants_that_can_join() {
    let problems = bad(r#"version = 1
[[tenant]]
name = "web"
user = 0
devices = ["8086:10d3"]
[[tenant]]
name = "web"
user = 1000
devices = ["8086:10d3"]
[[container]]
name = "pool"
members = ["wbe", "web"]
[[container]]
name = "pool"
"#)
    .to_string();
    for words in [
        "\"web\" is there twice",
        "did you mean `web`?",
        "can't join",
        "container \"pool\" is there twice",
        "nobody may join this container",
    ] {
        assert!(problems.contains(words), "{words}\n{problems}");
    }
}

#[test]
fn what_is_allowed_and_probably_not_meant_is_a_warning() {
    let cases = [
        ("anyone = true", "every process"),
        ("devices = [\"0000:65:00.0\"]", "whatever comes to be at 0000:65:00.0"),
        ("devices = [\"8086:10d3\", { id = \"8086:10d3\" }]", "any 8086:10d3 is there twice"),
        ("rights = [\"manage\"]", "none to manage"),
    ];
    for (line, message) in cases {
        let policy = good(&with(line));
        assert_eq!(policy.warnings().count(Severity::Warning), 1, "{}", policy.warnings());
        let warning = policy.warnings().iter().next().unwrap();
        assert!(warning.line == 5 && warning.message.contains(message), "{warning}");
    }
    let policy = good("version = 1\n");
    assert!(policy.warnings().to_string().contains("nobody may have anything"));
}
