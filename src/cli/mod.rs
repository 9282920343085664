//! The command line: one file a command, which owns its arguments and its output.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage, 3 wrong settings, 4 worker, log or datastore can't be reached,
//! 5 looked and something is not well, 130 ended by a second signal.

mod ask;
mod connectors;
mod consume;
mod dead_letters;
mod output;
mod plan;
mod preview;
mod run;
mod start;
mod status;
mod topics;
mod validate;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::config::ConfigError;
use crate::datastore::DatastoreErrorKind;
use crate::worker::{OpenError, WorkerSettings};

const CONFIG: [&str; 2] = ["config/tidegate.yaml", "/etc/tidegate/tidegate.yaml"];

/// Keeps a PostgreSQL datastore and the systems around it in step, through change events on a log.
#[derive(Parser)]
#[command(
    name = "tidegate",
    version,
    max_term_width = 110,
    after_help = "\
Start here:
  tidegate validate                     are the files right?
  tidegate plan                         what would be created, and what is missing
  tidegate preview erp-customers        the requests a sink would send, with nothing sent
  tidegate run                          run every connector of the connectors folder
  tidegate status --watch               in another terminal: states, lags, rates
  tidegate consume shop.public.orders   the change events, as JSON

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 wrong settings, 4 not reachable, 5 something is not well."
)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Args, Clone)]
pub struct Global {
    /// The worker's settings [default: config/tidegate.yaml, else /etc/tidegate/tidegate.yaml]
    #[arg(long, short, global = true, env = "TIDEGATE_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Tables for people, or JSON for scripts
    #[arg(long, short, global = true, value_enum, default_value_t = Output::Text)]
    pub output: Output,
    /// Log lines for people or as JSON
    #[arg(long, global = true, value_enum, env = "TIDEGATE_LOG_FORMAT")]
    pub log_format: Option<LogFormat>,
    /// error, warn, info, debug, trace, or `info,tidegate::sources=debug` [default: RUST_LOG, else the settings']
    #[arg(long, global = true, value_name = "LEVEL")]
    pub log_level: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Text,
    Json,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Human,
    Json,
}

#[derive(Subcommand)]
enum Command {
    Run(run::Run),
    Validate(validate::Validate),
    Plan(plan::Plan),
    Preview(preview::Preview),
    Status(status::Status),
    Topics(topics::Topics),
    Consume(consume::Consume),
    #[command(name = "dead-letters")]
    DeadLetters(dead_letters::DeadLetters),
    Connectors(connectors::Connectors),
}

/// What went wrong, what to do about it, and the exit code that says so to scripts.
#[derive(Debug)]
pub struct CliError {
    pub message: String,
    pub hint: Option<String>,
    pub code: u8,
}

pub const FAILED: u8 = 1;
pub const USAGE: u8 = 2;
pub const SETTINGS: u8 = 3;
pub const UNREACHABLE: u8 = 4;
pub const NOT_WELL: u8 = 5;

impl CliError {
    pub fn new(code: u8, message: impl Into<String>) -> Self {
        CliError { message: message.into(), hint: None, code }
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl From<ConfigError> for CliError {
    fn from(error: ConfigError) -> Self {
        CliError::new(SETTINGS, error.to_string())
    }
}

impl From<OpenError> for CliError {
    fn from(error: OpenError) -> Self {
        let code = match error {
            OpenError::State(_) | OpenError::Folder(_) => FAILED,
            _ => UNREACHABLE,
        };
        CliError::new(code, error.to_string())
    }
}

impl From<crate::log::LogError> for CliError {
    fn from(error: crate::log::LogError) -> Self {
        CliError::new(if error.is_retriable() { UNREACHABLE } else { FAILED }, error.to_string())
    }
}

impl From<crate::datastore::DatastoreError> for CliError {
    fn from(error: crate::datastore::DatastoreError) -> Self {
        let code = if error.kind == DatastoreErrorKind::Unavailable { UNREACHABLE } else { FAILED };
        CliError::new(code, error.to_string())
    }
}

impl From<std::io::Error> for CliError {
    fn from(error: std::io::Error) -> Self {
        CliError::new(FAILED, error.to_string())
    }
}

impl Global {
    pub fn json(&self) -> bool {
        self.output == Output::Json
    }

    /// The worker's settings, from where they were said to be or are expected.
    pub fn settings(&self) -> Result<WorkerSettings, CliError> {
        Ok(WorkerSettings::read_file(&self.config_path()?)?)
    }

    pub fn config_path(&self) -> Result<PathBuf, CliError> {
        if let Some(path) = &self.config {
            return Ok(path.clone());
        }
        CONFIG.iter().map(PathBuf::from).find(|path| path.is_file()).ok_or_else(|| {
            CliError::new(SETTINGS, format!("no settings: neither {} nor {} is there", CONFIG[0], CONFIG[1])).hint(
                "'tidegate --config FILE …' names them, or TIDEGATE_CONFIG does; or go to the folder that has config/",
            )
        })
    }
}

/// Carries out the command line of this process.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let global = cli.global.clone();
    match cli.carry_out() {
        Ok(code) => code,
        Err(error) => {
            output::error(&error, global.json());
            ExitCode::from(error.code)
        }
    }
}

impl Cli {
    fn carry_out(self) -> Result<ExitCode, CliError> {
        let global = &self.global;
        match self.command {
            Command::Run(command) => command.run(global),
            Command::Validate(command) => command.run(global),
            Command::Plan(command) => wait_for(global, command.run(global)),
            Command::Preview(command) => wait_for(global, command.run(global)),
            Command::Status(command) => wait_for(global, command.run(global)),
            Command::Topics(command) => wait_for(global, command.run(global)),
            Command::Consume(command) => wait_for(global, command.run(global)),
            Command::DeadLetters(command) => wait_for(global, command.run(global)),
            Command::Connectors(command) => wait_for(global, command.run(global)),
        }
    }
}

/// Runs a short command: one thread, log lines only of what is wrong.
fn wait_for(global: &Global, command: impl Future<Output = Result<ExitCode, CliError>>) -> Result<ExitCode, CliError> {
    output::start_logging(global.log_format, global.log_level.as_deref(), "warn")?;
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(command)
}
