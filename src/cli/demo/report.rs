//! What the demonstration prints: titles, and under each what was checked.

use crate::cli::style::{Style, print};
use crate::cli::{Context, Failure};
use serde_json::{Value, json};
use std::time::Instant;

#[derive(Debug)]
pub(super) struct Report {
    style: Style,
    json: bool,
    start: Instant,
    scenes: Vec<Value>,
    checks: usize,
}

impl Report {
    pub(super) fn new(context: &Context) -> Self {
        let (style, json) = (context.style, context.json);
        Self { style, json, start: Instant::now(), scenes: Vec::new(), checks: 0 }
    }

    fn say(&self, text: &str) -> Result<(), Failure> {
        if self.json { Ok(()) } else { Ok(print(text)?) }
    }

    pub(super) fn introduce(&self, text: &str) -> Result<(), Failure> {
        self.say(&format!("{text}\n"))
    }

    pub(super) fn begin_part(&mut self, title: &str) -> Result<(), Failure> {
        self.scenes.push(json!({ "scene": title, "checks": [] }));
        self.say(&format!("\n{}\n", self.style.bold(title)))
    }

    /// Tells what happened; it must be as told.
    pub(super) fn check(&mut self, holds: bool, text: impl AsRef<str>) -> Result<(), Failure> {
        let text = text.as_ref();
        self.checks += 1;
        let checks = self.scenes.last_mut().and_then(|scene| scene["checks"].as_array_mut());
        if let Some(checks) = checks {
            checks.push(json!({ "text": text, "ok": holds }));
        }
        let mark = if holds { self.style.green("ok") } else { self.style.red("no") };
        self.say(&format!("  {mark}  {text}\n"))?;
        if holds { Ok(()) } else { Err(Failure::new(format!("it is not as told: {text}"))) }
    }

    /// Something that is told and not checked.
    pub(super) fn note(&self, text: &str) -> Result<(), Failure> {
        self.say(&format!("      {}\n", self.style.dim(text)))
    }

    pub(super) fn end(&self, ok: bool) -> Result<(), Failure> {
        let took = self.start.elapsed();
        if self.json {
            let whole = json!({ "ok": ok, "checks": self.checks, "scenes": self.scenes });
            return Ok(crate::cli::style::print_json(&whole)?);
        }
        if !ok {
            return Ok(());
        }
        let count = self.checks;
        self.say(&format!("\n{count} checks, all as told, in {:.2} s\n", took.as_secs_f64()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_as_told_ends_the_demonstration() {
        let (socket, style) = ("/nonexistent".into(), Style::plain());
        let mut report = Report::new(&Context { socket, json: true, style });
        report.begin_part("one").unwrap();
        report.check(true, "good").unwrap();
        let failure = report.check(false, "bad").unwrap_err();
        assert!(format!("{failure:?}").contains("it is not as told: bad"));
        assert_eq!(report.scenes[0]["checks"][1], json!({ "text": "bad", "ok": false }));
    }
}
