//! `vfio-broker policy check`: what is wrong with a policy file, and what it says if nothing is.

use super::{Context, Failure, load, path_or_default};
use crate::cli::style::{Style, columns, complain, print, print_json};
use crate::policy::{Policy, Problem, Problems, Severity, Tenant};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Check a policy file: all that is wrong with it, each with its line
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The file [default: /etc/vfio-broker/policy.toml]
    file: Option<PathBuf>,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<ExitCode, Failure> {
    let file = path_or_default(&args.file);
    let policy = load(file, "FILE after `policy check`")?;
    let (code, problems) = match &policy {
        Ok(policy) => (ExitCode::SUCCESS, policy.warnings()),
        Err(problems) => (ExitCode::FAILURE, problems),
    };
    if context.json {
        print_json(&as_json(file, policy.as_ref().ok(), problems))?;
        return Ok(code);
    }
    for problem in problems.iter() {
        complain(&format!("{}\n\n", coloured(problem, Style::of(&std::io::stderr()))));
    }
    match &policy {
        Ok(policy) => print(&summary(file, policy))?,
        Err(problems) => complain(&format!("{}: {}\n", file.display(), count(problems))),
    }
    Ok(code)
}

fn coloured(problem: &Problem, style: Style) -> String {
    let text = problem.to_string();
    let word = problem.severity.to_string();
    let colour = match problem.severity {
        Severity::Error => style.red(&word),
        Severity::Warning => style.yellow(&word),
    };
    text.replacen(&word, &colour, 1)
}

fn count(problems: &Problems) -> String {
    let some = |count: usize, what: &str| match count {
        0 => None,
        1 => Some(format!("1 {what}")),
        _ => Some(format!("{count} {what}s")),
    };
    let errors = some(problems.count(Severity::Error), "error");
    let warnings = some(problems.count(Severity::Warning), "warning");
    let each: Vec<String> = errors.into_iter().chain(warnings).collect();
    if each.is_empty() { "good".into() } else { each.join(", ") }
}

fn summary(file: &Path, policy: &Policy) -> String {
    let mut text = format!("{}: {}\n", file.display(), count(policy.warnings()));
    let head = ["TENANT", "LINE", "RIGHTS", "HANDOUTS", "DEVICES"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for tenant in policy.tenants() {
        let devices: Vec<String> = tenant.devices().collect();
        rows.push(vec![
            tenant.name.clone(),
            tenant.line().to_string(),
            words(tenant.rights()),
            words(tenant.handouts()),
            shortened(&devices),
        ]);
    }
    text += &columns(&rows);
    for container in policy.containers() {
        let (name, trust) = (&container.name, word(&container.trust));
        text += &format!("container {name} ({trust}): {}\n", container.members.join(", "));
    }
    text
}

/// The first few of a list.
fn shortened(list: &[String]) -> String {
    const MOST: usize = 3;
    let first: Vec<&str> = list.iter().take(MOST).map(String::as_str).collect();
    match list.len() {
        0 => "-".into(),
        count if count > MOST => format!("{}; and {} more", first.join("; "), count - MOST),
        _ => first.join("; "),
    }
}

fn word(value: &impl serde::Serialize) -> String {
    let value = serde_json::to_value(value).unwrap_or_default();
    value.as_str().unwrap_or_default().to_owned()
}

/// A list as the policy file writes its words.
pub(super) fn words<T: serde::Serialize>(list: &[T]) -> String {
    list.iter().map(word).collect::<Vec<_>>().join(", ")
}

fn as_json(file: &Path, policy: Option<&Policy>, problems: &Problems) -> Value {
    let tenant = |tenant: &Tenant| {
        json!({
            "name": tenant.name,
            "line": tenant.line(),
            "rights": tenant.rights(),
            "devices": tenant.devices().collect::<Vec<_>>(),
            "handouts": tenant.handouts(),
            "backends": tenant.backends(),
            "accepts": tenant.accepts(),
            "managed": tenant.managed,
            "rebind": tenant.rebind,
            "memlock": tenant.memlock,
            "limits": tenant.limits,
        })
    };
    let container = |container: &crate::policy::SharedContainer| {
        let crate::policy::SharedContainer { name, trust, members, .. } = container;
        json!({ "name": name, "trust": trust, "members": members })
    };
    json!({
        "file": file,
        "good": policy.is_some(),
        "problems": problems,
        "tenants": policy.map(|p| p.tenants().iter().map(tenant).collect::<Vec<_>>()),
        "containers": policy.map(|p| p.containers().iter().map(container).collect::<Vec<_>>()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::users::SystemUsers;

    #[test]
    fn a_good_file_is_summed_up_and_a_bad_one_is_counted() {
        let text = "version = 1\n[[tenant]]\nname = \"t\"\nuser = 0\nhandouts = [\"devices\"]\n\
                    devices = [\"8086:0001\", \"8086:0002\", \"8086:0003\", \"8086:0004\"]\n\
                    [[container]]\nname = \"pool\"\nmembers = [\"t\"]\n";
        let policy = Policy::parse("p", text, &SystemUsers).unwrap();
        assert_eq!(
            summary(Path::new("p"), &policy),
            "p: good\n\
             TENANT  LINE  RIGHTS   HANDOUTS  DEVICES\n\
             t       2     acquire  devices   any 8086:0001; any 8086:0002; any 8086:0003; and 1 more\n\
             container pool (enforced): t\n"
        );
        let json = as_json(Path::new("p"), Some(&policy), policy.warnings());
        assert_eq!(json["tenants"][0]["limits"]["connections"], 64);
        let problems = Policy::parse("p", "version = 2\nx = 1\n", &SystemUsers).unwrap_err();
        assert_eq!(count(&problems), "2 errors, 1 warning");
        let json = as_json(Path::new("p"), None, &problems);
        assert_eq!((&json["good"], &json["problems"][0]["line"]), (&json!(false), &json!(1)));
    }
}
