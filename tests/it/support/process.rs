//! A child process that can't outlive the test process.
//!
//! A small shell stands between: its standard input is a pipe whose other end only the test process holds. When that end
//! closes (the value is dropped, the process exits, panics or is killed), the shell ends the server by its id. A signal
//! to the server is a line written into the same pipe, so no id is ever used after the process is gone.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

/// `$1` is the signal that ends the server, `$2` its log, the rest its command line. The first line out is its id, the last
/// `exit CODE`.
const GUARD: &str = r#"
end=$1 log=$2; shift 2
exec 3<&0 </dev/null
"$@" >>"$log" 2>&1 3<&- &
server=$!
echo "$server"
{
  while read -r signal; do kill -s "$signal" "$server"; done
  kill -s "$end" "$server"
  i=0
  while kill -0 "$server" && [ $i -lt 100 ]; do sleep 0.05; i=$((i + 1)); done
  kill -s KILL "$server"
} <&3 >/dev/null 2>&1 &
watcher=$!
exec 3<&-
wait "$server"
code=$?
kill "$watcher" 2>/dev/null
echo "exit $code"
"#;

/// A command line being put together.
pub struct Launch {
    name: String,
    program: OsString,
    args: Vec<OsString>,
    envs: Vec<(OsString, OsString)>,
    dir: Option<PathBuf>,
    log: Option<PathBuf>,
    end: &'static str,
}

impl Launch {
    pub fn new(name: &str, program: impl AsRef<OsStr>) -> Self {
        Self {
            name: name.into(),
            program: program.as_ref().into(),
            args: Vec::new(),
            envs: Vec::new(),
            dir: None,
            log: None,
            end: "KILL",
        }
    }

    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().into());
        self
    }

    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().into()));
        self
    }

    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.envs.push((name.as_ref().into(), value.as_ref().into()));
        self
    }

    pub fn dir(mut self, dir: impl AsRef<Path>) -> Self {
        self.dir = Some(dir.as_ref().into());
        self
    }

    /// Where standard output and error are appended; a file of its own when not told.
    pub fn log(mut self, log: impl AsRef<Path>) -> Self {
        self.log = Some(log.as_ref().into());
        self
    }

    /// The signal sent when the test process has gone or the [`Process`] is dropped; KILL when not told.
    pub fn end(mut self, signal: &'static str) -> Self {
        self.end = signal;
        self
    }

    pub fn start(self) -> Process {
        let (folder, log) = match self.log {
            Some(log) => (None, log),
            None => {
                let folder = Folder::new(&self.name);
                let log = folder.path().join("log");
                (Some(folder), log)
            }
        };
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(GUARD).arg("guard").arg(self.end).arg(&log);
        command.arg(&self.program).args(&self.args).envs(self.envs);
        if let Some(dir) = &self.dir {
            command.current_dir(dir);
        }
        // A group of its own: Ctrl-C reaches the tests alone, and their end is what the guard acts on.
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut guard = command.spawn().unwrap_or_else(|error| panic!("{}: can't start a shell: {error}", self.name));
        let stdin = guard.stdin.take().expect("piped");
        let mut lines = BufReader::new(guard.stdout.take().expect("piped")).lines();
        let pid = lines
            .next()
            .and_then(Result::ok)
            .and_then(|line| line.parse().ok())
            .unwrap_or_else(|| panic!("{}: the guard said nothing", self.name));
        let (tell, exit) = watch::channel(None);
        std::thread::spawn(move || {
            let code = lines.map_while(Result::ok).find_map(|line| line.strip_prefix("exit ")?.parse().ok());
            tell.send_replace(Some(code.unwrap_or(-1)));
        });
        Process {
            name: self.name,
            pid,
            stdin: Mutex::new(Some(stdin)),
            guard,
            exit,
            log,
            _folder: folder.map(Arc::new),
        }
    }
}

/// A running (or ended) process; ended when dropped.
pub struct Process {
    name: String,
    pid: u32,
    stdin: Mutex<Option<ChildStdin>>,
    guard: Child,
    exit: watch::Receiver<Option<i32>>,
    log: PathBuf,
    _folder: Option<Arc<Folder>>,
}

impl Process {
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// What it wrote to standard output and error so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Sends a signal by name (`TERM`, `KILL`, `STOP`, `CONT` …); nothing when it has ended.
    pub fn signal(&self, name: &str) {
        if let Some(stdin) = self.stdin.lock().expect("never poisoned: nothing panics under it").as_mut() {
            let _ = writeln!(stdin, "{name}");
        }
    }

    /// The exit code, when it has ended: 128 + N after signal N.
    pub fn exited(&self) -> Option<i32> {
        *self.exit.borrow()
    }

    /// Waits for its end; panics with the end of its log when it runs on after `deadline`.
    pub async fn wait(&self, deadline: Duration) -> i32 {
        let mut exit = self.exit.clone();
        let code = tokio::time::timeout(deadline, exit.wait_for(Option::is_some)).await;
        match code {
            Ok(Ok(code)) => code.unwrap_or(-1),
            _ => panic!("{} still runs after {deadline:?}; its log ends:\n{}", self.name, self.log_end(30)),
        }
    }

    /// `kill -9`, and waits until it is gone.
    pub async fn kill9(&self) {
        self.signal("KILL");
        self.wait(Duration::from_secs(10)).await;
    }

    pub fn log_end(&self, lines: usize) -> String {
        let log = self.log();
        let from = log.lines().count().saturating_sub(lines);
        log.lines().skip(from).collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.stdin.lock().expect("never poisoned: nothing panics under it").take());
        let _ = self.guard.wait(); // bounded: the guard kills after 5 s
    }
}

/// A folder under the system's temporary one, removed when dropped and when the test process ends.
pub struct Folder {
    path: PathBuf,
    stdin: Option<ChildStdin>,
}

/// Retried for a while: the server whose folder it is may still be ending.
const REMOVE: &str = r#"while read -r line; do :; done
i=0
while [ -e "$1" ] && [ $i -lt 100 ]; do rm -rf "$1" 2>/dev/null; [ -e "$1" ] && sleep 0.1; i=$((i + 1)); done"#;

impl Folder {
    pub fn new(name: &str) -> Self {
        let unique = uuid::Uuid::new_v4().simple().to_string();
        let path = std::env::temp_dir().join(format!("tidegate-test-{name}-{}", &unique[..12]));
        std::fs::create_dir_all(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let mut remover = Command::new("/bin/sh")
            .args(["-c", REMOVE, "remover"])
            .arg(&path)
            .process_group(0)
            .stdin(Stdio::piped())
            .spawn()
            .expect("a shell starts");
        let stdin = remover.stdin.take();
        std::thread::spawn(move || remover.wait()); // reaped when it ends
        Self { path, stdin }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(self.stdin.take());
    }
}

/// The built binary with these arguments, to be run with `.output().await`. For a worker that stays, take
/// [`tidegate_launch`].
pub fn tidegate<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> tokio::process::Command {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_tidegate"));
    command.args(args).stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// The built binary as a guarded process: `tidegate_launch(["run", "--config", …]).start()`.
pub fn tidegate_launch<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Launch {
    Launch::new("tidegate", env!("CARGO_BIN_EXE_tidegate")).args(args)
}

/// A free port of 127.0.0.1 for a server that may be stopped and started again on it: below the range that the system
/// takes for outgoing connections, so that none of those sits on it meanwhile.
pub fn free_port() -> u16 {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let port = rand::random_range(25_600..32_700);
        let three = [port, port + 1, port + 2];
        // A server binds its ports seconds after it was given them.
        if three.iter().all(|port| !given.contains(port) && TcpListener::bind(("127.0.0.1", *port)).is_ok()) {
            given.extend(three);
            return port;
        }
    }
}

/// The cache folder of installed servers (scripts/cache-dir.sh).
pub fn cache_dir() -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/cache-dir.sh");
    PathBuf::from(run(&mut Command::new(script)).trim_end())
}

/// Runs an install script of scripts/; quick when everything is there.
pub fn install(script: &str, args: &[&str]) {
    run(Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts").join(script)).args(args));
}

/// Runs to the end and gives the standard output; panics with everything it said when it fails.
pub fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}\n{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}
