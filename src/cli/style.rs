//! How things look: colour on a terminal only, columns, sizes and times.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::io::{IsTerminal, Write};

/// Whether to colour.
#[derive(Clone, Copy, Debug)]
pub(super) struct Style {
    colour: bool,
}

impl Style {
    /// For what is written there: coloured where it is a terminal and `NO_COLOR` is not set.
    pub(super) fn of(stream: &impl IsTerminal) -> Self {
        let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { colour: stream.is_terminal() && !refused }
    }

    #[cfg(test)]
    pub(super) fn plain() -> Self {
        Self { colour: false }
    }

    pub(super) fn bold(&self, text: &str) -> String {
        self.wrap("1", text)
    }

    pub(super) fn dim(&self, text: &str) -> String {
        self.wrap("2", text)
    }

    pub(super) fn red(&self, text: &str) -> String {
        self.wrap("31", text)
    }

    pub(super) fn green(&self, text: &str) -> String {
        self.wrap("32", text)
    }

    pub(super) fn yellow(&self, text: &str) -> String {
        self.wrap("33", text)
    }

    fn wrap(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// Writes to standard output; a reader that has closed it, such as `head`, is no error.
pub(super) fn print(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => result.map_err(|error| {
            std::io::Error::new(error.kind(), format!("can't write to standard output: {error}"))
        }),
    }
}

/// Writes to standard error; where that is closed or full there is nobody to be told.
pub(super) fn complain(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// Text from elsewhere as it may stand in a line on a terminal: what could move the cursor, hide
/// text or turn it round is escaped.
pub(super) fn printable(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                clean.extend(character.escape_unicode())
            }
            _ if character.is_control() => clean.extend(character.escape_default()),
            _ => clean.push(character),
        }
    }
    clean
}

/// The same for text of several lines.
pub(super) fn printable_lines(text: &str) -> String {
    text.split('\n').map(printable).collect::<Vec<_>>().join("\n")
}

/// What came from the broker, each string of it printable.
pub(super) fn all_printable<T: Serialize + DeserializeOwned>(value: T) -> std::io::Result<T> {
    let mut value = serde_json::to_value(value)?;
    clean(&mut value);
    Ok(serde_json::from_value(value)?)
}

fn clean(value: &mut Value) {
    match value {
        Value::String(text) => *text = printable(text),
        Value::Array(list) => list.iter_mut().for_each(clean),
        Value::Object(fields) => fields.values_mut().for_each(clean),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// Writes a value as JSON, on lines of its own.
pub(super) fn print_json(value: &impl Serialize) -> std::io::Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    print(&(text + "\n"))
}

/// Writes a value as JSON, on one line: for programs that read line by line.
pub(super) fn print_json_line(value: &impl Serialize) -> std::io::Result<()> {
    let text = serde_json::to_string(value)?;
    print(&(text + "\n"))
}

/// Rows of cells as aligned columns, two spaces between them.
pub(super) fn columns(rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = Vec::new();
    for row in rows {
        for (i, cell) in row.iter().enumerate() {
            let width = cell.chars().count();
            match widths.get_mut(i) {
                Some(widest) => *widest = width.max(*widest),
                None => widths.push(width),
            }
        }
    }
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line += &format!("{cell:width$}  ");
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

/// A number of bytes: `64 MiB`, `4 KiB`, `100 B`.
pub(super) fn bytes(count: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    while unit + 1 < units.len() && count >> (10 * (unit + 1)) > 0 {
        unit += 1;
    }
    let whole = 1u64 << (10 * unit);
    let name = units.get(unit).copied().unwrap_or_default();
    if count.is_multiple_of(whole) {
        format!("{} {name}", count / whole)
    } else {
        format!("{:.1} {name}", count as f64 / whole as f64)
    }
}

/// A number of bytes that a limit is, which may be none.
pub(super) fn limit(most: u64) -> String {
    if most == nix::libc::RLIM_INFINITY { "unlimited".into() } else { bytes(most) }
}

/// How long ago a time in seconds since 1970 was: `12 s`, `5 min`, `3 h`, `2 d`.
pub(super) fn ago(at: u64) -> String {
    match crate::sys::process::now().saturating_sub(at) {
        seconds @ 0..=119 => format!("{seconds} s"),
        seconds @ 120..=7199 => format!("{} min", seconds / 60),
        seconds @ 7200..=172_799 => format!("{} h", seconds / 3600),
        seconds => format!("{} d", seconds / 86_400),
    }
}

/// A time in seconds since 1970 with its age: `02:04:10 UTC, 3 min ago`.
pub(super) fn since(at: u64) -> String {
    format!("{} UTC, {} ago", clock(at), ago(at))
}

/// The time of day, in UTC, of a time in seconds since 1970: `02:04:10`.
pub(super) fn clock(at: u64) -> String {
    let (hours, minutes, seconds) = (at / 3600 % 24, at / 60 % 60, at % 60);
    format!("{hours:02}:{minutes:02}:{seconds:02}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::process::now;
    use serde_json::json;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [["A", "BB"], ["long", "ü"], ["x", ""]];
        let rows: Vec<_> = rows.map(|row| row.map(str::to_owned).to_vec()).to_vec();
        assert_eq!(columns(&rows), "A     BB\nlong  ü\nx\n");
    }

    #[test]
    fn sizes_are_in_the_largest_unit_that_fits() {
        let cases = [(0, "0 B"), (1023, "1023 B"), (4096, "4 KiB"), (64 << 20, "64 MiB")];
        for (count, text) in cases {
            assert_eq!(bytes(count), text);
        }
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(u64::MAX), "16.0 EiB");
    }

    #[test]
    fn a_time_is_told_with_its_age() {
        assert!(since(1_795_225_946).starts_with("01:52:26 UTC, "), "{}", since(1_795_225_946));
        assert_eq!(since(now() - 3600).split(", ").nth(1), Some("60 min ago"));
        assert_eq!(ago(now() - 7 * 86_400), "7 d");
    }

    #[test]
    fn what_comes_from_elsewhere_moves_no_cursor() {
        assert_eq!(printable("\x1b[2Jü\u{9b}1m\n\u{202e}"), r"\u{1b}[2Jü\u{9b}1m\n\u{202e}");
        assert_eq!(printable_lines("a\nb\r"), "a\nb\\r");
        let value = json!({ "a": ["\x07", { "b": "\t" }], "c": 1 });
        let clean = all_printable(value).unwrap();
        assert_eq!(clean, json!({ "a": ["\\u{7}", { "b": "\\t" }], "c": 1 }));
    }

    #[test]
    fn only_a_terminal_is_coloured() {
        assert_eq!(Style::plain().red("x"), "x");
        assert_eq!(Style { colour: true }.red("x"), "\x1b[31mx\x1b[0m");
    }
}
