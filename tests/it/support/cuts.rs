//! A door in front of PostgreSQL that hears each command of its clients, prepared ones too, and cuts one connection off
//! at a chosen one: right before it, or when it is done and the answer not yet given.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI32, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_postgres::Client;

use super::postgres::Database;

const LONG: Duration = Duration::from_secs(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// The server's process is ended, and the command never read.
    Before,
    /// The server has done it, and nobody hears of that.
    After,
}

/// A command as it was said.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Said {
    pub text: String,
    /// Between `BEGIN` and `COMMIT`.
    pub within: bool,
}

struct Cut {
    text: String,
    when: When,
    /// How many of it pass before.
    skip: usize,
}

struct Inside {
    server: u16,
    superuser: Client,
    said: Mutex<Vec<Said>>,
    cut: Mutex<Option<Cut>>,
    made: Semaphore,
}

pub struct Cuts {
    pub port: u16,
    inside: Arc<Inside>,
}

/// One client's connection.
#[derive(Default)]
struct Connection {
    /// The server's process.
    pid: AtomicI32,
    /// Questions without an answer.
    open: AtomicI64,
    /// The answer is not given.
    mute: std::sync::atomic::AtomicBool,
}

impl Connection {
    async fn is_answered(&self) {
        let deadline = Instant::now() + LONG;
        while self.open.load(Ordering::SeqCst) > 0 {
            assert!(Instant::now() < deadline, "the server does not answer");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

impl Cuts {
    pub async fn start(database: &Database<'_>) -> Cuts {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let inside = Arc::new(Inside {
            server: database.server.port(),
            superuser: database.connect_as_superuser().await,
            said: Mutex::default(),
            cut: Mutex::default(),
            made: Semaphore::new(0),
        });
        let serving = inside.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(serve(client, serving.clone()));
            }
        });
        Cuts { port, inside }
    }

    /// The database behind this door; without TLS, which it does not speak.
    pub fn url(&self, database: &Database<'_>) -> String {
        database.url_at(self.port) + "?sslmode=disable"
    }

    /// What was said since it was last asked.
    pub fn said(&self) -> Vec<Said> {
        std::mem::take(&mut self.inside.said.lock().unwrap())
    }

    /// Cuts whoever says this next, `skip` times passed over.
    pub fn cut(&self, text: &str, when: When, skip: usize) {
        *self.inside.cut.lock().unwrap() = Some(Cut { text: text.to_owned(), when, skip });
    }

    /// Whether the cut was made, within so long.
    pub async fn is_made(&self, within: Duration) -> bool {
        match tokio::time::timeout(within, self.inside.made.acquire()).await {
            Ok(made) => {
                made.unwrap().forget();
                true
            }
            Err(_) => false,
        }
    }
}

impl Inside {
    fn is_cut(&self, text: &str, within: bool) -> Option<When> {
        self.said.lock().unwrap().push(Said { text: text.to_owned(), within });
        let mut cut = self.cut.lock().unwrap();
        let armed = cut.as_mut().filter(|cut| cut.text == text)?;
        if armed.skip > 0 {
            armed.skip -= 1;
            return None;
        }
        cut.take().map(|cut| cut.when)
    }

    async fn terminate(&self, pid: i32) {
        self.superuser.execute("SELECT pg_terminate_backend($1)", &[&pid]).await.unwrap();
        let there = "SELECT count(*) FROM pg_stat_activity WHERE pid = $1";
        let deadline = Instant::now() + LONG;
        while self.superuser.query_one(there, &[&pid]).await.unwrap().get::<_, i64>(0) > 0 {
            assert!(Instant::now() < deadline, "the backend {pid} does not end");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

async fn serve(client: TcpStream, inside: Arc<Inside>) {
    let Ok(server) = TcpStream::connect(("127.0.0.1", inside.server)).await else { return };
    let _ = client.set_nodelay(true);
    let _ = server.set_nodelay(true);
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let connection = Connection::default();
    // Whichever ends first takes the other with it.
    tokio::select! {
        () = forth(from_client, to_server, &inside, &connection) => {}
        () = back(from_server, to_client, &connection) => {}
    }
}

/// Type (0 in a first message) and the whole of a message.
async fn message(from: &mut OwnedReadHalf, first: bool) -> Option<(u8, Vec<u8>)> {
    let mut whole = vec![0; if first { 4 } else { 5 }];
    from.read_exact(&mut whole).await.ok()?;
    let length = whole.last_chunk::<4>().map(|length| u32::from_be_bytes(*length) as usize)?;
    let head = whole.len();
    whole.resize(head + length - 4, 0);
    from.read_exact(&mut whole[head..]).await.ok()?;
    Some((if first { 0 } else { whole[0] }, whole))
}

fn text(bytes: &[u8]) -> (String, &[u8]) {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    (String::from_utf8_lossy(&bytes[..end]).into_owned(), bytes.get(end + 1..).unwrap_or_default())
}

async fn forth(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, inside: &Inside, connection: &Connection) {
    let Some((_, startup)) = message(&mut from, true).await else { return };
    if to.write_all(&startup).await.is_err() {
        return;
    }
    let mut prepared: HashMap<String, String> = HashMap::new();
    let mut within = false;
    while let Some((kind, whole)) = message(&mut from, false).await {
        let said = match kind {
            b'P' => {
                let (name, rest) = text(&whole[5..]);
                prepared.insert(name, text(rest).0);
                None
            }
            b'B' => {
                let name = text(text(&whole[5..]).1).0;
                prepared.get(&name).cloned()
            }
            b'Q' => Some(text(&whole[5..]).0),
            _ => None,
        };
        if let Some(said) = said {
            let begins = said.starts_with("BEGIN") || said.starts_with("START TRANSACTION");
            let ends = said == "COMMIT" || said == "ROLLBACK";
            match inside.is_cut(&said, within || begins) {
                Some(When::Before) => {
                    // The server's end is this task's, too.
                    inside.made.add_permits(1);
                    inside.terminate(connection.pid.load(Ordering::SeqCst)).await;
                }
                Some(When::After) => {
                    connection.is_answered().await;
                    connection.mute.store(true, Ordering::SeqCst);
                }
                None => {}
            }
            within = (within || begins) && !ends;
        }
        if matches!(kind, b'Q' | b'S') {
            connection.open.fetch_add(1, Ordering::SeqCst);
        }
        if to.write_all(&whole).await.is_err() {
            return;
        }
        if connection.mute.load(Ordering::SeqCst) && matches!(kind, b'Q' | b'S') {
            connection.is_answered().await;
            inside.made.add_permits(1);
            return;
        }
    }
}

async fn back(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, connection: &Connection) {
    let mut ready = false;
    while let Some((kind, whole)) = message(&mut from, false).await {
        match kind {
            b'K' => connection.pid.store(i32::from_be_bytes(whole[5..9].try_into().unwrap()), Ordering::SeqCst),
            // The first is the answer to the startup.
            b'Z' if std::mem::replace(&mut ready, true) => {
                connection.open.fetch_sub(1, Ordering::SeqCst);
            }
            _ => {}
        }
        if !connection.mute.load(Ordering::SeqCst) && to.write_all(&whole).await.is_err() {
            return;
        }
    }
}
