//! What is wrong with a policy file, and where.

use serde::Serialize;
use std::fmt;
use std::ops::Range;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The file is not used.
    Error,
    /// The file is used; this is probably not what was meant.
    Warning,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Error => "error",
            Self::Warning => "warning",
        })
    }
}

/// One thing that is wrong, shown with its line and a caret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// How bad it is.
    pub severity: Severity,
    /// The file, as the caller named it.
    pub file: String,
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// How many characters of that line are meant, at least 1.
    pub length: usize,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
    /// The line itself.
    pub source: String,
}

impl Problem {
    /// Adds what to do about it.
    pub(super) fn help(&mut self, help: impl Into<String>) -> &mut Self {
        self.help = Some(help.into());
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { severity, file, line, column, length, message, help, source } = self;
        let gutter = " ".repeat(line.to_string().len());
        // A tab stays one, so that the caret is below what it means at any width of tabs.
        let pad: String =
            source.chars().take(column - 1).map(|c| if c == '\t' { '\t' } else { ' ' }).collect();
        writeln!(f, "{severity}: {message}")?;
        writeln!(f, "{gutter}--> {file}:{line}:{column}")?;
        writeln!(f, "{gutter} |")?;
        writeln!(f, "{line} | {source}")?;
        write!(f, "{gutter} | {pad}{}", "^".repeat(*length))?;
        if let Some(help) = help {
            write!(f, "\n{gutter} = help: {help}")?;
        }
        Ok(())
    }
}

/// All that is wrong with a file, in the order of its lines.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Problems(Vec<Problem>);

impl Problems {
    /// Each of them.
    pub fn iter(&self) -> std::slice::Iter<'_, Problem> {
        self.0.iter()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Only those that make the file of no use.
    pub fn into_errors(mut self) -> Self {
        self.0.retain(|problem| problem.severity == Severity::Error);
        self
    }

    /// How many of them are of this severity.
    pub fn count(&self, severity: Severity) -> usize {
        self.iter().filter(|problem| problem.severity == severity).count()
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, problem) in self.iter().enumerate() {
            let between = if at == 0 { "" } else { "\n\n" };
            write!(f, "{between}{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// Gathers problems while a file is read.
pub(super) struct Report<'s> {
    file: &'s str,
    text: &'s str,
    /// Where each line begins.
    starts: Vec<usize>,
    problems: Vec<Problem>,
}

impl<'s> Report<'s> {
    pub(super) fn new(file: &'s str, text: &'s str) -> Self {
        let ends = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n');
        let starts = std::iter::once(0).chain(ends.map(|(at, _)| at + 1)).collect();
        Self { file, text, starts, problems: Vec::new() }
    }

    pub(super) fn error(&mut self, span: Range<usize>, message: impl Into<String>) -> &mut Problem {
        self.add(Severity::Error, span, message.into())
    }

    pub(super) fn warn(&mut self, span: Range<usize>, message: impl Into<String>) -> &mut Problem {
        self.add(Severity::Warning, span, message.into())
    }

    fn add(&mut self, severity: Severity, span: Range<usize>, message: String) -> &mut Problem {
        let (line, start, source) = self.locate(span.start);
        let column = self.text.get(start..span.start).map_or(0, |before| before.chars().count());
        let meant = self.text.get(span).unwrap_or_default();
        let first_line = meant.lines().next().unwrap_or_default();
        // A control character would act on the terminal it is shown on.
        let shown = |c: char| if c.is_control() && c != '\t' { '\u{fffd}' } else { c };
        let problem = Problem {
            severity,
            file: self.file.to_owned(),
            line,
            column: column + 1,
            length: first_line.chars().count().max(1),
            message,
            help: None,
            source: source.chars().map(shown).collect(),
        };
        // In the order of the file, and what comes later after what came first.
        let key = |p: &Problem| (p.line, p.column);
        let at = self.problems.partition_point(|earlier| key(earlier) <= key(&problem));
        self.problems.insert(at, problem);
        &mut self.problems[at]
    }

    /// The line that holds a byte: its number, where it begins, what it says.
    fn locate(&self, at: usize) -> (usize, usize, &'s str) {
        let line = self.starts.partition_point(|start| *start <= at).max(1);
        let start = self.starts[line - 1];
        (line, start, self.text.get(start..).and_then(|rest| rest.lines().next()).unwrap_or(""))
    }

    /// The number of the line that holds a byte.
    pub(super) fn line(&self, at: usize) -> usize {
        self.locate(at).0
    }

    pub(super) fn has_errors(&self) -> bool {
        self.problems.iter().any(|problem| problem.severity == Severity::Error)
    }

    pub(super) fn into_problems(self) -> Problems {
        Problems(self.problems)
    }
}
