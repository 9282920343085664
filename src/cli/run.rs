//! `tidegate run`: the worker, until a signal.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{CliError, FAILED, Global, LogFormat, UNREACHABLE, output};
use crate::rest::{Metrics, Server};
use crate::worker::{Worker, WorkerSettings};

/// Threads that run connectors: their work waits more than it computes.
const MOST_THREADS: usize = 4;
/// Ended by a second signal.
const AT_ONCE: u8 = 130;

/// Run every connector of the connectors folder, until SIGTERM or Ctrl-C
///
/// The folder is watched: a new, changed or removed file takes effect at once, and disturbs no other connector.
/// The first signal drains what is in flight and stops: `shutdown.deadline` is how long that may take, after which
/// what is in flight is dropped, and the process is gone within 9 s more. A second signal stops at once. Nothing is
/// lost either way, nor by kill -9. Exit code 0 after the first signal, 130 after the second.
#[derive(Args)]
#[command(after_help = "\
Examples:
  tidegate run
  tidegate --config /etc/tidegate/tidegate.yaml run --log-format json
  RUST_LOG=info,tidegate::sources=debug tidegate run")]
pub struct Run {}

impl Run {
    pub fn run(self, global: &Global) -> Result<ExitCode, CliError> {
        let settings = global.settings()?;
        let format = global.log_format.or(match settings.logging.format.as_deref() {
            Some("json") => Some(LogFormat::Json),
            _ => None,
        });
        let level = settings.logging.level.as_deref().unwrap_or("info");
        output::start_logging(format, global.log_level.as_deref(), level)?;
        let metrics = Metrics::install().map_err(|error| CliError::new(FAILED, error.to_string()))?;
        let threads = std::thread::available_parallelism().map_or(2, usize::from).clamp(1, MOST_THREADS);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(threads)
            .max_blocking_threads(64)
            .thread_keep_alive(Duration::from_secs(5))
            .enable_all()
            .build()?;
        let done = runtime.block_on(serve(settings, metrics));
        match &done {
            Ok(code) if *code == ExitCode::from(AT_ONCE) => runtime.shutdown_background(),
            // Blocking work that hangs (a dead disk) must not keep the process.
            _ => runtime.shutdown_timeout(Duration::from_secs(1)),
        }
        done
    }
}

async fn serve(settings: WorkerSettings, metrics: Metrics) -> Result<ExitCode, CliError> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let drain = settings.drain;
    let listen = settings.rest.listen;
    let worker = tokio::select! {
        worker = Worker::start(settings) => worker?,
        () = either(&mut terminate, &mut interrupt) => return Ok(ExitCode::SUCCESS),
    };
    let server = match Server::start(worker.clone(), metrics).await {
        Ok(server) => server,
        Err(error) => {
            let _ = worker.stop().await;
            return Err(CliError::new(UNREACHABLE, format!("the worker can't listen at {listen}: {error}"))
                .hint("another worker may run there; rest.listen in the settings names another address"));
        }
    };
    tracing::info!("running; health, metrics and status at http://{}", server.address());
    either(&mut terminate, &mut interrupt).await;
    tracing::info!("stopping: draining for {drain:?} at the most; another signal stops at once");
    let stopped = tokio::select! {
        stopped = worker.stop() => stopped,
        () = either(&mut terminate, &mut interrupt) => {
            tracing::warn!("stopped at once; what was in flight is done again at the next start");
            return Ok(ExitCode::from(AT_ONCE));
        }
    };
    server.stop().await;
    stopped.map_err(|fault| CliError::new(FAILED, format!("while stopping: {fault}")))?;
    tracing::info!("stopped");
    Ok(ExitCode::SUCCESS)
}

async fn either(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}
