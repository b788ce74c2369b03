//! The program `vfio-broker`: everything a person types. One file a subcommand.

mod acquire;
mod attach;
mod completions;
mod confirm;
mod daemon;
mod demo;
mod detach;
mod drain;
mod exec;
mod exec_memlock;
mod failure;
mod leases;
mod man;
mod pci_names;
mod policy;
mod processes;
mod qemu;
mod revoke;
mod status;
mod style;
mod topology;
mod watch;

use crate::client::{self, Client};
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, Parser, Subcommand};
use failure::Failure;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use style::Style;

/// Ask vfio-brokerd for devices, and see who has what.
#[derive(Debug, Parser)]
#[command(name = "vfio-broker", version, max_term_width = 100, after_help = EXIT_CODES)]
struct Cli {
    /// The broker's socket [default: $VFIO_BROKER_SOCKET, or /run/vfio-broker/broker.sock]
    #[arg(long, global = true, value_name = "PATH", display_order = 900)]
    socket: Option<PathBuf>,
    /// Print JSON: on standard output what is there, on standard error what went wrong
    #[arg(long, global = true, display_order = 901)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "\
Exit codes: 0 done; 1 failed; 2 wrong usage; 3 denied by the policy; 4 busy, or not free yet: the \
same request may work later; 5 no broker to talk to.";

#[derive(Debug, Subcommand)]
enum Command {
    Demo(demo::Args),
    Acquire(acquire::Args),
    Exec(exec::Args),
    Attach(attach::Args),
    Detach(detach::Args),
    Leases(leases::Args),
    Topology(topology::Args),
    Watch(watch::Args),
    Status(status::Args),
    Revoke(revoke::Args),
    Drain(drain::Args),
    Confirm(confirm::Args),
    Policy(policy::Args),
    Completions(completions::Args),
    Man(man::Args),
    #[command(hide = true)]
    Daemon(daemon::Args),
    #[command(hide = true)]
    DemoAgent(demo::agent::Args),
}

/// The command line without what is hidden, for completions and manual pages.
fn visible() -> clap::Command {
    let whole = Cli::command();
    let shown = whole.get_subcommands().filter(|command| !command.is_hide_set());
    clap::Command::new("vfio-broker")
        .version(env!("CARGO_PKG_VERSION"))
        .about(whole.get_about().cloned().unwrap_or_default())
        .after_help(EXIT_CODES)
        .subcommand_required(true)
        .args(whole.get_arguments().cloned())
        .subcommands(shown.cloned())
}

/// What every subcommand is given.
struct Context {
    socket: PathBuf,
    json: bool,
    style: Style,
}

impl Context {
    fn connect(&self) -> Result<Client, Failure> {
        Ok(Client::connect_to(&self.socket)?)
    }
}

/// With a word about what is forgotten most, and none about what is hidden.
fn explained(mut error: clap::Error) -> clap::Error {
    if let Some(ContextValue::Strings(similar)) = error.remove(ContextKind::SuggestedSubcommand) {
        let shown = visible();
        let similar: Vec<_> =
            similar.into_iter().filter(|name| shown.find_subcommand(name).is_some()).collect();
        if !similar.is_empty() {
            error.insert(ContextKind::SuggestedSubcommand, ContextValue::Strings(similar));
        }
    }
    let unexpected = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(word)) if error.kind() == ErrorKind::UnknownArgument => word,
        _ => return error,
    };
    let exec = std::env::args_os().any(|word| word == "exec");
    if exec && !unexpected.starts_with('-') {
        let tip = "the program and its arguments come after `--`: exec OPTIONS -- PROGRAM...";
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip.into()]));
    }
    error
}

/// Wrong usage, in the form that was asked for; or help, which was asked for too.
fn misused(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() || !asks_for_json(std::env::args_os().skip(1)) {
        error.exit();
    }
    let text = error.to_string();
    let what = text.split("\n\nUsage:").next().unwrap_or_default();
    let words: Vec<_> = what.trim_start_matches("error: ").split_whitespace().collect();
    Failure::new(words.join(" ")).advise("see --help").code(2).report(true)
}

/// Whether `--json` is among the options, and not of what comes after `--`.
fn asks_for_json(words: impl Iterator<Item = OsString>) -> bool {
    words.take_while(|word| word != "--").any(|word| word == "--json")
}

/// Runs the program: reads the command line, does what it says.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return misused(&explained(error)),
    };
    if cli.socket.is_some() && matches!(cli.command, Command::Demo(_)) {
        let why = "demo starts a broker of its own: it takes no --socket";
        Cli::command().error(ErrorKind::ArgumentConflict, why).exit();
    }
    let context = Context {
        socket: cli.socket.unwrap_or_else(client::socket_path),
        json: cli.json,
        style: Style::of(&std::io::stdout()),
    };
    let result = match cli.command {
        Command::Demo(args) => demo::run(&context, &args),
        Command::Acquire(args) => acquire::run(&context, args),
        Command::Exec(args) => match exec::run(&context, args) {
            Ok(code) => return code,
            Err(failure) => Err(failure),
        },
        Command::Attach(args) => attach::run(&context, args),
        Command::Detach(args) => detach::run(&context, &args),
        Command::Leases(args) => leases::run(&context, &args),
        Command::Topology(args) => topology::run(&context, &args),
        Command::Watch(args) => watch::run(&context, &args),
        Command::Status(args) => status::run(&context, &args),
        Command::Revoke(args) => match revoke::run(&context, &args) {
            Ok(code) => return code,
            Err(failure) => Err(failure),
        },
        Command::Drain(args) => match drain::run(&context, &args) {
            Ok(code) => return code,
            Err(failure) => Err(failure),
        },
        Command::Confirm(args) => confirm::run(&context, &args),
        Command::Policy(args) => match policy::run(&context, &args) {
            Ok(code) => return code,
            Err(failure) => Err(failure),
        },
        Command::Completions(args) => completions::run(&args),
        Command::Man(args) => man::run(&args),
        Command::Daemon(args) => daemon::run(args),
        Command::DemoAgent(_) => demo::agent::run(&context.socket),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(context.json),
    }
}
