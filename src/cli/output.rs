//! What commands print: tables for people, JSON for scripts, errors with a hint, log lines.

use std::io::{self, IsTerminal, Write};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;
use tracing_subscriber::EnvFilter;

use super::{CliError, FAILED, LogFormat, USAGE};
use crate::worker::is_log_level;

/// Log lines go to standard error: what `--log-level` (`asked`) says, else RUST_LOG, else `level`.
pub fn start_logging(format: Option<LogFormat>, asked: Option<&str>, level: &str) -> Result<(), CliError> {
    let quiet = |level: &str| {
        EnvFilter::try_new(format!("{level},rustls=warn,tokio_postgres=warn,hyper=warn,librdkafka=warn"))
            .map_err(|error| wrong_level(level, error))
    };
    let filter = match (asked, std::env::var("RUST_LOG")) {
        (None, Ok(text)) if !text.is_empty() => EnvFilter::try_new(&text).map_err(|error| wrong_level(&text, error))?,
        (Some(asked), _) if !is_log_level(asked) => return Err(wrong_level(asked, "no level")),
        (asked, _) => quiet(asked.unwrap_or(level))?,
    };
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    let started = match format {
        Some(LogFormat::Json) => lines.json().flatten_event(true).try_init(),
        _ => lines.with_target(false).with_ansi(io::stderr().is_terminal()).try_init(),
    };
    started.map_err(|error| CliError::new(FAILED, format!("log lines can't be set up: {error}")))
}

fn wrong_level(level: &str, error: impl std::fmt::Display) -> CliError {
    CliError::new(USAGE, format!("log level '{level}': {error}"))
        .hint("error, warn, info, debug or trace; a part's own after commas: info,tidegate::sources=debug")
}

/// To standard error. Nobody may be left to read it; the exit code tells all the same.
pub fn error(error: &CliError, json: bool) {
    let text = if json {
        serde_json::json!({ "error": error.message, "hint": error.hint, "code": error.code }).to_string()
    } else {
        let hint = error.hint.as_ref().map_or(String::new(), |hint| format!("\nhint: {hint}"));
        format!("error: {}{hint}", error.message)
    };
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// A line to standard error that is no failure of the command.
pub fn remark(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Prints to standard output; a reader that has gone (`| head`) ends the program quietly.
pub fn print(text: &str) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => Err(error.into()),
    }
}

/// Whether whoever read standard output has gone (`--follow | head -1`), which no write tells while there is nothing
/// to print.
pub fn reader_is_gone() -> bool {
    let out = io::stdout();
    let mut watched = [PollFd::new(&out, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut watched, Some(&now)).is_ok() && watched[0].revents().contains(PollFlags::ERR)
}

pub fn print_json(value: &impl Serialize) -> Result<(), CliError> {
    let text = serde_json::to_string_pretty(value).map_err(|error| CliError::new(FAILED, error.to_string()))?;
    print(&format!("{text}\n"))
}

/// Columns as wide as they must be; the last one takes what it needs.
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(head: &[&str]) -> Self {
        Table { rows: vec![head.iter().map(|name| (*name).to_owned()).collect()] }
    }

    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    pub fn text(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let mut widths = vec![0; columns];
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(cell);
                let gap = width - cell.chars().count() + 2;
                line.extend(std::iter::repeat_n(' ', gap));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// `1.4 MB`
pub fn bytes(bytes: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB", "PB"];
    let mut size = bytes as f64;
    let mut unit = 0;
    while size >= 1000.0 && unit + 1 < units.len() {
        size /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{size:.1} {}", units[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1_400_000), "1.4 MB");
    }

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["NAME", "STATE"]);
        table.row(["shop".into(), "RUNNING".into()]);
        table.row(["erp-customers".into(), "FAILED".into()]);
        assert_eq!(table.text(), "NAME           STATE\nshop           RUNNING\nerp-customers  FAILED\n");
    }
}
