//! Replication commands, and the task that owns the stream's socket.
//!
//! [`stream`] reads whole messages, many at a time, and hands them on through a queue that is bounded in bytes. While
//! the queue is full it goes on telling the server what is durable, on a timer: an answer must not depend on anyone
//! reading. It tells nothing but what [`Acknowledged`] holds (CORRECTNESS 4).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures::FutureExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::event::Lsn;

use super::frames::{Reader, next_frame, server_error};
use super::pgoutput::POSTGRES_EPOCH_US;
use super::session::{Rows, identifier, literal};
use super::{PostgresError, Session};

/// Bytes received and not yet taken up by the source.
const QUEUE_BYTES: usize = 16 << 20;
const COMMAND: Duration = Duration::from_secs(20);
/// What is durable is told this often while it moves …
const STATUS: Duration = Duration::from_millis(100);
/// … and this often in any case: a server that is not read from can't ask, and ends the connection after its
/// `wal_sender_timeout`.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Silence after which an answer is asked for.
const ASKING: Duration = Duration::from_secs(5);
/// Silence after which the server counts as gone.
const SILENCE: Duration = Duration::from_secs(60);
/// A walsender writes row by row: at more than this many bytes a second, reads wait for each other, or there would be a
/// system call, a wake-up and a batch for each few rows. Below, every read is handed on at once.
const BUSY_RATE: f64 = 2e6;
/// What the rate is taken over.
const BUSY_WINDOW: Duration = Duration::from_millis(5);
/// While busy, how long bytes gather between two reads.
const GATHER: Duration = Duration::from_millis(2);
/// Bytes put together at the most.
const GATHER_BYTES: usize = 128 << 10;

/// What `IDENTIFY_SYSTEM` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SystemIdentity {
    pub system_identifier: String,
    pub timeline: u32,
    pub wal_end: Lsn,
}

/// A slot just made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreatedSlot {
    /// Every commit that ends later is streamed, every earlier one is in the snapshot.
    pub consistent_point: Lsn,
    /// Good as long as the session that made the slot gives no other command.
    pub snapshot: Option<String>,
}

/// How long a slot lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotKind {
    /// Until it is dropped. `failover`: standbys that synchronize slots have it, too (PostgreSQL 17).
    Lasting { failover: bool },
    /// As long as the session that makes it.
    Temporary,
}

fn field(rows: &Rows, column: usize, during: &str) -> Result<String, PostgresError> {
    rows.first()
        .and_then(|row| row.get(column)?.clone())
        .ok_or_else(|| PostgresError::Protocol(format!("{during} gave no value in column {}", column + 1)))
}

fn lsn(text: &str) -> Result<Lsn, PostgresError> {
    text.parse().map_err(|error: crate::event::LsnParseError| PostgresError::Protocol(error.to_string()))
}

pub async fn identify_system(session: &mut Session) -> Result<SystemIdentity, PostgresError> {
    let rows = session.query("IDENTIFY_SYSTEM", COMMAND).await?;
    let timeline = field(&rows, 1, "IDENTIFY_SYSTEM")?;
    Ok(SystemIdentity {
        system_identifier: field(&rows, 0, "IDENTIFY_SYSTEM")?,
        timeline: timeline.parse().map_err(|_| PostgresError::Protocol(format!("timeline '{timeline}'")))?,
        wal_end: lsn(&field(&rows, 2, "IDENTIFY_SYSTEM")?)?,
    })
}

/// The timelines that `timeline` came from, each with the LSN at which it was left.
pub async fn timeline_history(session: &mut Session, timeline: u32) -> Result<Vec<(u32, Lsn)>, PostgresError> {
    let rows = session.query(&format!("TIMELINE_HISTORY {timeline}"), COMMAND).await?;
    let content = field(&rows, 1, "TIMELINE_HISTORY")?;
    let left = |line: &str| -> Option<(u32, Lsn)> {
        let mut words = line.split_whitespace();
        Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
    };
    Ok(content.lines().filter_map(left).collect())
}

/// Makes a logical slot for pgoutput. The server waits for every transaction that is under way, so `deadline` is
/// about the longest of them.
pub async fn create_slot(
    session: &mut Session,
    name: &str,
    kind: SlotKind,
    export_snapshot: bool,
    deadline: Duration,
) -> Result<CreatedSlot, PostgresError> {
    let name = identifier(name);
    let export = if export_snapshot { "EXPORT" } else { "NOEXPORT" };
    let command = match kind {
        SlotKind::Temporary => format!("CREATE_REPLICATION_SLOT {name} TEMPORARY LOGICAL pgoutput {export}_SNAPSHOT"),
        SlotKind::Lasting { failover: false } => {
            format!("CREATE_REPLICATION_SLOT {name} LOGICAL pgoutput {export}_SNAPSHOT")
        }
        SlotKind::Lasting { failover: true } => {
            let snapshot = if export_snapshot { "export" } else { "nothing" };
            format!("CREATE_REPLICATION_SLOT {name} LOGICAL pgoutput (SNAPSHOT '{snapshot}', FAILOVER true)")
        }
    };
    let rows = session.query(&command, deadline).await?;
    Ok(CreatedSlot {
        consistent_point: lsn(&field(&rows, 1, "CREATE_REPLICATION_SLOT")?)?,
        snapshot: rows.first().and_then(|row| row.get(2)?.clone()),
    })
}

/// Begins to stream what ends after `from`.
pub async fn start_replication(
    session: &mut Session,
    slot: &str,
    from: Lsn,
    publication: &str,
) -> Result<(), PostgresError> {
    let publications = literal(&identifier(publication));
    let command = format!(
        "START_REPLICATION SLOT {} LOGICAL {from} (proto_version '1', publication_names {}, messages 'true')",
        identifier(slot),
        publications.trim_start()
    );
    timeout(COMMAND, session.copy_both(&command))
        .await
        .unwrap_or_else(|_| Err(PostgresError::Timeout { what: "START_REPLICATION".into(), after: COMMAND }))
}

/// What is durable, told by the source and passed on to the server; and what the server said of itself.
#[derive(Debug, Default)]
pub struct Acknowledged {
    durable: AtomicU64,
    server_end: AtomicU64,
    asked: AtomicU64,
}

impl Acknowledged {
    pub fn new(durable: Lsn) -> Arc<Self> {
        Arc::new(Acknowledged { durable: AtomicU64::new(durable.0), ..Self::default() })
    }

    /// Everything that ends at or before `lsn` is durable, or was filtered. Never goes back.
    pub fn advance(&self, lsn: Lsn) {
        self.durable.fetch_max(lsn.0, Ordering::Release);
    }

    pub fn durable(&self) -> Lsn {
        Lsn(self.durable.load(Ordering::Acquire))
    }

    /// End of the server's WAL, as far as it told.
    pub fn server_end(&self) -> Lsn {
        Lsn(self.server_end.load(Ordering::Relaxed))
    }

    /// How often the server has asked for an answer (it does so when it wants to shut down).
    pub fn asked(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }
}

/// Whole messages as they were received, and their share of the queue's bound, given back when dropped.
#[derive(Debug)]
pub struct Chunk {
    pub bytes: Bytes,
    _share: OwnedSemaphorePermit,
}

/// The receiving end of a stream.
pub type Chunks = mpsc::Receiver<Result<Chunk, PostgresError>>;

/// Runs the stream in a task of its own. The task ends when `stop` is cancelled (after a last status and goodbye),
/// when the receiver is dropped, or with an error as the queue's last item.
pub fn spawn_stream(
    session: Session,
    acknowledged: Arc<Acknowledged>,
    stop: CancellationToken,
) -> (Chunks, tokio::task::JoinHandle<()>) {
    // The bound is in bytes; the number of chunks only has to be enough for small ones.
    let (sender, receiver) = mpsc::channel(1024);
    let task = tokio::spawn(async move {
        let mut stream = Stream {
            session,
            acknowledged,
            room: Arc::new(Semaphore::new(QUEUE_BYTES >> 10)),
            received: Lsn::ZERO,
            told: Lsn::ZERO,
            told_at: Instant::now(),
            heard_at: Instant::now(),
            window: (Instant::now(), 0),
            busy: false,
            more: false,
        };
        let result = tokio::select! {
            result = stream.run(&sender) => result,
            () = stop.cancelled() => {
                stream.goodbye().await;
                return;
            }
            () = sender.closed() => {
                stream.goodbye().await;
                return;
            }
        };
        if let Err(error) = result {
            let _ = sender.send(Err(error)).await;
        }
    });
    (receiver, task)
}

struct Stream {
    session: Session,
    acknowledged: Arc<Acknowledged>,
    room: Arc<Semaphore>,
    /// Highest LSN received.
    received: Lsn,
    told: Lsn,
    told_at: Instant,
    heard_at: Instant,
    /// When bytes were last counted, and how many came since.
    window: (Instant, usize),
    busy: bool,
    /// The last read stopped before all was read that is there.
    more: bool,
}

/// What a look at the received bytes found.
struct Scan {
    /// Bytes of whole messages.
    end: usize,
    /// The server wants an answer.
    asked: bool,
    /// A message that is not of the stream follows them: its tag and length.
    other: Option<(u8, usize)>,
}

impl Stream {
    async fn run(&mut self, queue: &mpsc::Sender<Result<Chunk, PostgresError>>) -> Result<(), PostgresError> {
        let mut timer = interval(STATUS);
        timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                _ = timer.tick() => {
                    self.on_timer().await?;
                    continue;
                }
                read = self.session.read_more() => self.gather(read?)?,
            }
            self.heard_at = Instant::now();
            let scan = self.scan()?;
            if scan.end > 0 {
                let bytes = self.session.received().split_to(scan.end).freeze();
                self.hand_on(bytes, queue, &mut timer).await?;
            }
            if scan.asked {
                self.acknowledged.asked.fetch_add(1, Ordering::Relaxed);
                self.tell(false).await?;
            }
            if let Some((tag, length)) = scan.other {
                let bytes = self.session.received().split_to(length);
                match tag {
                    b'S' | b'N' | b'A' => {}
                    b'E' => {
                        let error = server_error(&bytes[5..], "replication");
                        return Err(PostgresError::Server(Box::new(error)));
                    }
                    b'c' | b'C' | b'Z' => {
                        return Err(PostgresError::Connection {
                            address: self.session.address().to_owned(),
                            reason: "the server ended the replication stream".into(),
                        });
                    }
                    tag => {
                        return Err(PostgresError::Protocol(format!("'{}' in a stream", tag.escape_ascii())));
                    }
                }
            }
            if self.busy && !self.more {
                self.session.rest()?;
                sleep(GATHER).await;
            }
        }
    }

    /// Takes what else is there behind a read of `read` bytes, and looks whether there is much to do.
    fn gather(&mut self, mut read: usize) -> Result<(), PostgresError> {
        self.more = false;
        if self.busy {
            self.session.received().reserve(GATHER_BYTES * 2);
            while let Some(more) = self.session.read_more().now_or_never() {
                read += more?;
                if read >= GATHER_BYTES {
                    self.more = true;
                    break;
                }
            }
        }
        self.window.1 += read;
        let elapsed = self.window.0.elapsed();
        if elapsed >= BUSY_WINDOW {
            self.busy = self.window.1 as f64 > BUSY_RATE * elapsed.as_secs_f64();
            self.window = (Instant::now(), 0);
        }
        Ok(())
    }

    fn scan(&mut self) -> Result<Scan, PostgresError> {
        let mut scan = Scan { end: 0, asked: false, other: None };
        let (mut received, mut server_end) = (self.received, Lsn::ZERO);
        let bytes = self.session.received();
        while let Some((frame, length)) = next_frame(&bytes[scan.end..])? {
            if frame.tag != b'd' {
                scan.other = Some((frame.tag, length));
                break;
            }
            let mut body = Reader::new(frame.body);
            match body.u8()? {
                b'w' => {
                    received = received.max(Lsn(body.u64()?));
                    server_end = server_end.max(Lsn(body.u64()?));
                }
                b'k' => {
                    let end = Lsn(body.u64()?);
                    received = received.max(end);
                    server_end = server_end.max(end);
                    body.i64()?;
                    scan.asked |= body.u8()? != 0;
                }
                other => return Err(PostgresError::Protocol(format!("stream message '{}'", other.escape_ascii()))),
            }
            scan.end += length;
        }
        self.received = received;
        self.acknowledged.server_end.fetch_max(server_end.0, Ordering::Relaxed);
        Ok(scan)
    }

    /// Waits for room in the queue, and keeps the server informed meanwhile.
    async fn hand_on(
        &mut self,
        bytes: Bytes,
        queue: &mpsc::Sender<Result<Chunk, PostgresError>>,
        timer: &mut tokio::time::Interval,
    ) -> Result<(), PostgresError> {
        let share = (bytes.len() >> 10).clamp(1, QUEUE_BYTES >> 10) as u32;
        let room = self.room.clone();
        let mut waiting = std::pin::pin!(async {
            let share = room.acquire_many_owned(share).await.ok()?;
            queue.send(Ok(Chunk { bytes, _share: share })).await.ok()
        });
        loop {
            tokio::select! {
                biased;
                sent = &mut waiting => {
                    return match sent {
                        Some(()) => Ok(()),
                        // The receiver is gone: the caller's select ends this.
                        None => std::future::pending().await,
                    };
                }
                _ = timer.tick() => {
                    self.heard_at = Instant::now();
                    self.on_timer().await?;
                }
            }
        }
    }

    async fn on_timer(&mut self) -> Result<(), PostgresError> {
        if self.heard_at.elapsed() > SILENCE {
            return Err(PostgresError::Timeout { what: "any word from the server".into(), after: SILENCE });
        }
        if self.told_at.elapsed() >= HEARTBEAT {
            return self.tell(self.heard_at.elapsed() >= ASKING).await;
        }
        if self.acknowledged.durable() != self.told {
            return self.tell(false).await;
        }
        Ok(())
    }

    /// Standby status update: received, flushed and applied, the time, and whether an answer is wanted.
    async fn tell(&mut self, ask: bool) -> Result<(), PostgresError> {
        let durable = self.acknowledged.durable();
        let now = chrono::Utc::now().timestamp_micros() - POSTGRES_EPOCH_US;
        let mut out = BytesMut::with_capacity(39);
        out.put_u8(b'd');
        out.put_u32(4 + 34);
        out.put_u8(b'r');
        out.put_u64(self.received.max(durable).0);
        out.put_u64(durable.0);
        out.put_u64(durable.0);
        out.put_i64(now);
        out.put_u8(u8::from(ask));
        timeout(COMMAND, self.session.send(&out))
            .await
            .unwrap_or_else(|_| Err(PostgresError::Timeout { what: "a status update".into(), after: COMMAND }))?;
        (self.told, self.told_at) = (durable, Instant::now());
        Ok(())
    }

    async fn goodbye(&mut self) {
        let parting = async {
            self.tell(false).await?;
            let mut out = BytesMut::new();
            postgres_protocol::message::frontend::copy_done(&mut out);
            postgres_protocol::message::frontend::terminate(&mut out);
            self.session.send(&out).await
        };
        let _ = timeout(Duration::from_secs(2), parting).await;
    }
}
