//! What holds for every policy: deny beats allow, and what is not allowed is denied. Checked against
//! a model that knows sets of devices only.

use super::{Machine, good, peer};
use crate::pci::{DeviceFacts, Id};
use crate::policy::{Policy, Problems};
use crate::protocol::Bdf;
use proptest::collection::vec;
use proptest::prelude::*;

/// A small world, so that rules and devices meet often: two addresses, two kinds, two PFs.
#[derive(Clone, Copy, Debug)]
enum Rule {
    Bdf(u8),
    BdfAs(u8, u8),
    Kind(u8),
    KindWith(u8, u8),
    VfOf(u8),
    VfOfAs(u8, u8),
}

fn bdf(n: u8) -> Bdf {
    Bdf { segment: 0, bus: 0x65, device: n, function: 0 }
}

fn id(n: u8) -> Id {
    Id(0x8086, u16::from(n))
}

fn facts() -> impl Strategy<Value = DeviceFacts> {
    (0..3u8, 0..3u8, 0..3u8, prop::option::of(0..3u8)).prop_map(|(at, kind, subsystem, pf)| {
        DeviceFacts {
            bdf: bdf(at),
            vendor: id(kind).0,
            device: id(kind).1,
            subsystem_vendor: id(subsystem).0,
            subsystem_device: id(subsystem).1,
            class: 0x020000,
            physfn: pf.map(bdf),
            serial: None,
        }
    })
}

impl Rule {
    fn any() -> impl Strategy<Value = Self> {
        (0..6, 0..3u8, 0..3u8).prop_map(|(kind, a, b)| match kind {
            0 => Self::Bdf(a),
            1 => Self::BdfAs(a, b),
            2 => Self::Kind(a),
            3 => Self::KindWith(a, b),
            4 => Self::VfOf(a),
            _ => Self::VfOfAs(a, b),
        })
    }

    /// In a deny, an address stands alone.
    fn for_deny(self) -> Self {
        if let Self::BdfAs(at, _) = self { Self::Bdf(at) } else { self }
    }

    fn toml(self) -> String {
        match self {
            Self::Bdf(at) => format!("\"{}\"", bdf(at)),
            Self::BdfAs(at, kind) => format!("{{ bdf = \"{}\", id = \"{}\" }}", bdf(at), id(kind)),
            Self::Kind(kind) => format!("\"{}\"", id(kind)),
            Self::KindWith(kind, subsystem) => {
                format!("{{ id = \"{}\", subsystem = \"{}\" }}", id(kind), id(subsystem))
            }
            Self::VfOf(pf) => format!("{{ vf_of = \"{}\" }}", bdf(pf)),
            Self::VfOfAs(pf, kind) => {
                format!("{{ vf_of = \"{}\", id = \"{}\" }}", bdf(pf), id(kind))
            }
        }
    }

    fn matches(self, facts: &DeviceFacts) -> bool {
        let at = |n| facts.bdf == bdf(n);
        let kind = |n| facts.id() == id(n);
        let vf_of = |n| facts.physfn == Some(bdf(n));
        match self {
            Self::Bdf(a) => at(a),
            Self::BdfAs(a, k) => at(a) && kind(k),
            Self::Kind(k) => kind(k),
            Self::KindWith(k, s) => kind(k) && facts.subsystem() == id(s),
            Self::VfOf(pf) => vf_of(pf),
            Self::VfOfAs(pf, k) => vf_of(pf) && kind(k),
        }
    }
}

fn list(key: &str, rules: &[Rule]) -> String {
    if rules.is_empty() {
        return String::new();
    }
    let each: Vec<_> = rules.iter().map(|rule| rule.toml()).collect();
    format!("{key} = [\n{}\n]\n", each.join(",\n"))
}

fn parse(text: &str) -> Result<Policy, Problems> {
    Policy::parse("policy.toml", text, &Machine)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn deny_beats_allow_and_no_allow_is_a_no(
        allow in vec(Rule::any(), 1..5),
        deny in vec(Rule::any().prop_map(Rule::for_deny), 0..3),
        deny_all in vec(Rule::any().prop_map(Rule::for_deny), 0..3),
        facts in facts(),
    ) {
        let mut text = format!(
            "version = 1\n[[tenant]]\nname = \"t\"\nuser = 1000\n{}{}",
            list("devices", &allow),
            list("deny", &deny),
        );
        if !deny_all.is_empty() {
            text += &format!("[[deny]]\nreason = \"no\"\n{}", list("devices", &deny_all));
        }
        let policy = good(&text);
        let tenant = policy.tenant(&peer(1000)).unwrap();
        let decision = policy.device(tenant, &facts);

        let any = |rules: &[Rule]| rules.iter().any(|rule| rule.matches(&facts));
        let denied = any(&deny) || any(&deny_all);
        prop_assert_eq!(decision.allowed, any(&allow) && !denied, "{}\n{:?}\n{:?}", text, facts, decision);
        // The rule names a line of the file, and one of the list that decided.
        let line: usize = decision.rule.rsplit(':').next().unwrap().parse().unwrap();
        let named = text.lines().nth(line - 1).unwrap();
        if decision.allowed {
            let by = allow.iter().find(|rule| rule.matches(&facts)).unwrap();
            prop_assert_eq!(named.trim_end_matches(','), by.toml());
        } else if denied {
            prop_assert!(decision.rule.contains("deny["), "{:?}", decision);
        }
    }

    #[test]
    fn text_of_any_kind_does_not_panic(text in "\\PC*") {
        let _ = parse(&text);
    }

    #[test]
    fn pieces_of_policies_do_not_panic(
        pieces in vec(prop::sample::select(PIECES.to_vec()), 0..24),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut text = pieces.concat();
        let ends: Vec<_> = text.char_indices().map(|(at, _)| at).collect();
        if !ends.is_empty() {
            text.truncate(ends[cut.index(ends.len())]);
        }
        if let Err(problems) = parse(&text) {
            prop_assert!(!problems.is_empty());
            let lines = text.lines().count().max(1);
            for problem in problems.iter() {
                // At the end of a file that ends in a newline there is one more, empty, line.
                prop_assert!(problem.line >= 1 && problem.line <= lines + 1);
                prop_assert!(!problem.to_string().is_empty());
            }
        }
    }
}

const PIECES: [&str; 40] = [
    "version = 1\n",
    "version",
    "[[tenant]]\n",
    "[[container]]\n",
    "[[deny]]\n",
    "[tenant.limits]\n",
    "name = \"a\"\n",
    "name = \"é\"\n",
    "user = ",
    "group = ",
    "unit = ",
    "label = ",
    "1000",
    "65534",
    "\"alice\"",
    "\"nobody\"",
    "\n",
    "\r\n",
    " = ",
    "[",
    "]",
    "{",
    "}",
    ",",
    "\"",
    "\"\"\"",
    "#",
    "devices = [\"8086:10d3\"]\n",
    "deny = ",
    "{ bdf = \"0000:65:00.0\" }",
    "{ vf_of = ",
    "reason = \"no\"\n",
    "members = [\"a\"]\n",
    "trust = \"mutual\"\n",
    "anyone = true\n",
    "accept = [\"overflow-uid\"]\n",
    "-1",
    "1e400",
    "1979-05-27",
    "\t\u{2028}😀",
];
