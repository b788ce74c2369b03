//! Reading TOML values of one shape or reporting what they are instead. Each function reports and
//! gives back what is left of it, so that all of a file's mistakes are found in one go.

use super::problem::Report;
use std::ops::Range;
use strsim::osa_distance;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// A value with its place.
pub(super) type Value<'i> = Spanned<DeValue<'i>>;

/// A table whose keys are known, with its place.
pub(super) struct Section<'a, 'i> {
    table: &'a DeTable<'i>,
    pub(super) span: Range<usize>,
    /// What the unknown keys in it were probably meant to be.
    meant: Vec<String>,
}

impl<'a, 'i> Section<'a, 'i> {
    pub(super) fn get(&self, key: &str) -> Option<&'a Value<'i>> {
        self.table.get(key)
    }

    /// Whether none of these keys is there. A key that is misspelt is not missing too.
    pub(super) fn lacks(&self, keys: &[&str]) -> bool {
        let meant = |key: &&str| self.meant.iter().any(|meant| meant == key);
        !keys.iter().any(|key| self.get(key).is_some() || meant(key))
    }

    /// How many keys there are.
    pub(super) fn len(&self) -> usize {
        self.table.len()
    }
}

impl Report<'_> {
    /// A table with these keys and no others.
    pub(super) fn section<'a, 'i>(
        &mut self,
        value: &'a Value<'i>,
        what: &str,
        known: &[&str],
    ) -> Option<Section<'a, 'i>> {
        let Some(table) = value.get_ref().as_table() else {
            self.not_a(value, what, "a table");
            return None;
        };
        Some(self.known_keys(table, value.span(), what, known))
    }

    /// The same for a table that is known to be one.
    pub(super) fn known_keys<'a, 'i>(
        &mut self,
        table: &'a DeTable<'i>,
        span: Range<usize>,
        what: &str,
        known: &[&str],
    ) -> Section<'a, 'i> {
        let mut meant = Vec::new();
        for key in table.keys().filter(|key| !known.contains(&key.get_ref().as_ref())) {
            let name = key.get_ref();
            let special = special_key(what, name);
            let near = special.map(|(key, _)| key).or_else(|| nearest(name, known));
            let help =
                special.map_or_else(|| did_you_mean(name, known), |(_, help)| help.to_owned());
            meant.extend(near.map(str::to_owned));
            self.error(key.span(), format!("{what} has no key `{name}`")).help(help);
        }
        Section { table, span, meant }
    }

    fn not_a(&mut self, value: &Value<'_>, what: &str, expected: &str) {
        let kind = value.get_ref().type_str();
        self.error(value.span(), format!("{what} must be {expected}, not {}", a(kind)));
    }

    pub(super) fn string<'a>(&mut self, value: &'a Value<'_>, what: &str) -> Option<&'a str> {
        let text = value.get_ref().as_str();
        if text.is_none() {
            self.not_a(value, what, "a string");
        }
        text
    }

    pub(super) fn boolean(&mut self, value: &Value<'_>, what: &str) -> Option<bool> {
        let truth = value.get_ref().as_bool();
        if truth.is_none() {
            self.not_a(value, what, "true or false");
        }
        truth
    }

    /// A whole number from 0 on.
    pub(super) fn number(&mut self, value: &Value<'_>, what: &str) -> Option<u64> {
        let Some(integer) = value.get_ref().as_integer() else {
            self.not_a(value, what, "a whole number");
            return None;
        };
        let number = u64::from_str_radix(integer.as_str(), integer.radix()).ok();
        if number.is_none() {
            self.error(
                value.span(),
                format!("{what} must be a whole number from 0 on, and less than 2^64"),
            );
        }
        number
    }

    /// Bytes: a whole number, or one with a unit.
    pub(super) fn size(&mut self, value: &Value<'_>, what: &str) -> Option<u64> {
        let Some(text) = value.get_ref().as_str() else { return self.number(value, what) };
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (count, unit) = text.split_at(digits);
        let shift = match unit.trim_start() {
            "" => Some(0),
            "KiB" => Some(10),
            "MiB" => Some(20),
            "GiB" => Some(30),
            "TiB" => Some(40),
            _ => None,
        };
        let bytes = shift.and_then(|shift| count.parse::<u64>().ok()?.checked_mul(1 << shift));
        if bytes.is_none() {
            self.error(value.span(), format!("{what} must be a size, not {text:?}"))
                .help("write it as \"512MiB\" or \"4GiB\" (KiB, MiB, GiB, TiB: powers of 1024)");
        }
        bytes
    }

    /// The items of a list; an empty one is an error.
    pub(super) fn list<'a, 'i>(&mut self, value: &'a Value<'i>, what: &str) -> &'a [Value<'i>] {
        let Some(items) = value.get_ref().as_array() else {
            self.not_a(value, what, "a list");
            return &[];
        };
        if items.is_empty() {
            self.error(value.span(), format!("{what} is empty")).help("list at least one");
        }
        items
    }

    /// One item without brackets, or a list.
    pub(super) fn one_or_list<'a, 'i>(
        &mut self,
        value: &'a Value<'i>,
        what: &str,
    ) -> &'a [Value<'i>] {
        if value.get_ref().is_array() {
            return self.list(value, what);
        }
        std::slice::from_ref(value)
    }

    /// The tables of `[[what]]`.
    pub(super) fn tables<'a, 'i>(
        &mut self,
        section: &Section<'a, 'i>,
        what: &str,
    ) -> &'a [Value<'i>] {
        let Some(value) = section.get(what) else { return &[] };
        match value.get_ref() {
            DeValue::Array(items) => items,
            DeValue::Table(_) => {
                self.error(
                    value.span(),
                    format!("[{what}] is one table, {what} is a list of them"),
                )
                .help(format!("write [[{what}]], with two brackets"));
                &[]
            }
            _ => {
                self.not_a(value, what, "a list of tables");
                &[]
            }
        }
    }

    /// One of some words.
    pub(super) fn word<T: Copy>(
        &mut self,
        value: &Value<'_>,
        what: &str,
        words: &[(&str, T)],
    ) -> Option<T> {
        let text = self.string(value, what)?;
        if let Some((_, meant)) = words.iter().find(|(word, _)| *word == text) {
            return Some(*meant);
        }
        let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        self.error(value.span(), format!("{what} can't be {text:?}"))
            .help(did_you_mean(text, &known));
        None
    }

    /// A list of words, none of them twice.
    pub(super) fn words<T: Copy + PartialEq>(
        &mut self,
        value: &Value<'_>,
        what: &str,
        words: &[(&str, T)],
    ) -> Vec<T> {
        let mut found = Vec::new();
        for item in self.list(value, what) {
            let Some(word) = self.word(item, &format!("an entry of {what}"), words) else {
                continue;
            };
            if found.contains(&word) {
                self.error(item.span(), format!("{what} has this twice"));
            } else {
                found.push(word);
            }
        }
        found
    }

    /// A name as it can stand in a log line, a list and a file name.
    pub(super) fn name(&mut self, section: &Section<'_, '_>, what: &str) -> Option<String> {
        if section.lacks(&["name"]) {
            self.error(section.span.clone(), format!("{what} needs a name"))
                .help("add `name = \"...\"`");
        }
        let value = section.get("name")?;
        let name = self.string(value, "name")?;
        let good = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
        if name.is_empty() || name.len() > 64 || !name.bytes().all(good) {
            self.error(value.span(), format!("{name:?} can't be a name"))
                .help("a name is 1 to 64 of A-Z a-z 0-9 - _ .");
            return None;
        }
        Some(name.to_owned())
    }
}

/// Keys that people will try and that have another name here, or another place: the key that is
/// meant, and help.
fn special_key(what: &str, key: &str) -> Option<(&'static str, &'static str)> {
    let (meant, help) = match (what, key) {
        ("a tenant", "containers") => {
            ("", "who may join a container is said once, in [[container]] members")
        }
        ("a tenant", "uid" | "uids" | "username") => {
            ("user", "write `user = ...`: a name, a uid, or a list")
        }
        ("a tenant", "gid" | "gids") => ("group", "write `group = ...`: a name, a gid, or a list"),
        ("a tenant", "selinux") => ("label", "write `label = \"user:role:type\"`"),
        ("a tenant", "new_id") => {
            ("", "drivers are chosen for one device at a time; new_id is never written")
        }
        ("a device", "vendor" | "device") => ("id", "write `id = \"8086:10d3\"`"),
        _ => return None,
    };
    Some((meant, help))
}

/// Help for a word that is not known: the nearest of those that are, or all of them.
pub(super) fn did_you_mean(word: &str, known: &[&str]) -> String {
    match nearest(word, known) {
        Some(near) => format!("did you mean `{near}`?"),
        None if known.is_empty() => "there is none".into(),
        None => format!("it can be {}", known.join(", ")),
    }
}

/// The known word that this one is probably a misspelling of: few letters are changed, added, left out,
/// or swapped with their neighbour.
fn nearest<'k>(word: &str, known: &[&'k str]) -> Option<&'k str> {
    let (distance, near) = known.iter().map(|known| (osa_distance(word, known), *known)).min()?;
    (distance <= 1.max(near.len() / 3)).then_some(near)
}

/// With its article.
fn a(kind: &str) -> String {
    let vowel = kind.starts_with(['a', 'e', 'i', 'o', 'u']);
    format!("{} {kind}", if vowel { "an" } else { "a" })
}
