//! A fault proxy: stands in front of a real HTTP server and does to its requests what no server can be made to do.
//! Answers lost after the request was applied, connections reset, storms of 429, slow answers; by request, a
//! number of times or with a probability from a seed. It counts and keeps what it has seen.
//!
//! It speaks plain HTTP/1.1 with the client, one fresh connection to the server for each request.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

/// What is done to a request instead of passing it on, or beside it.
#[derive(Clone, Debug)]
pub enum Fault {
    /// Answered by the proxy; the server never sees the request.
    Answer { status: u16, headers: Vec<(String, String)>, body: String },
    /// The server applies the request; its answer is never passed on, the connection stays open for so long.
    LoseAnswer { hold: Duration },
    /// The server applies the request; the client's connection is reset.
    ResetAfter,
    /// Reset before the server sees anything.
    ResetBefore,
    /// Passed on and answered, that much later.
    Delay(Duration),
}

impl Fault {
    pub fn status(status: u16) -> Self {
        Fault::Answer { status, headers: Vec::new(), body: format!("{{\"error\":\"fault {status}\"}}") }
    }

    pub fn retry_after(status: u16, seconds: u64) -> Self {
        let headers = vec![("Retry-After".to_owned(), seconds.to_string())];
        Fault::Answer { status, headers, body: "\"slow down\"".to_owned() }
    }
}

/// Which requests, and how often.
#[derive(Clone, Debug)]
pub struct Script {
    method: Option<String>,
    path: String,
    body: String,
    skip: usize,
    left: usize,
    chance: Option<f64>,
    fault: Fault,
}

impl Script {
    /// Every request.
    pub fn any(fault: Fault) -> Self {
        Script {
            method: None,
            path: String::new(),
            body: String::new(),
            skip: 0,
            left: usize::MAX,
            chance: None,
            fault,
        }
    }

    /// Requests of this method whose path and query contain `path`.
    pub fn on(method: &str, path: &str, fault: Fault) -> Self {
        Script { method: Some(method.to_owned()), path: path.to_owned(), ..Script::any(fault) }
    }

    /// … and whose body contains `text`.
    pub fn body(mut self, text: &str) -> Self {
        self.body = text.to_owned();
        self
    }

    /// Only the first `times` that match.
    pub fn times(mut self, times: usize) -> Self {
        self.left = times;
        self
    }

    /// Lets the first `skip` that match pass.
    pub fn after(mut self, skip: usize) -> Self {
        self.skip = skip;
        self
    }

    /// Each that matches with this probability, by the proxy's seed.
    pub fn chance(mut self, chance: f64) -> Self {
        self.chance = Some(chance);
        self
    }

    fn matches(&self, request: &Seen) -> bool {
        self.method.as_ref().is_none_or(|method| *method == request.method)
            && request.path.contains(&self.path)
            && request.body.contains(&self.body)
    }
}

/// A request as the proxy saw it.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: String,
    /// With its query.
    pub path: String,
    pub body: String,
    /// The server got it.
    pub forwarded: bool,
}

struct Inside {
    server: SocketAddr,
    scripts: Vec<Script>,
    seen: Vec<Seen>,
    random: u64,
}

impl Inside {
    /// xorshift64*, in [0, 1).
    fn chance(&mut self) -> f64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        (self.random.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn fault(&mut self, request: &Seen) -> Option<Fault> {
        for index in 0..self.scripts.len() {
            if !self.scripts[index].matches(request) || self.scripts[index].left == 0 {
                continue;
            }
            if self.scripts[index].skip > 0 {
                self.scripts[index].skip -= 1;
                continue;
            }
            if let Some(chance) = self.scripts[index].chance
                && self.chance() >= chance
            {
                continue;
            }
            self.scripts[index].left -= 1;
            return Some(self.scripts[index].fault.clone());
        }
        None
    }
}

pub struct Proxy {
    address: SocketAddr,
    inside: Arc<Mutex<Inside>>,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl Proxy {
    /// In front of the server at `server`, on a free port.
    pub async fn start(server: SocketAddr) -> Proxy {
        Proxy::start_seeded(server, 0x5eed).await
    }

    pub async fn start_seeded(server: SocketAddr, seed: u64) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound address");
        let inside = Inside { server, scripts: Vec::new(), seen: Vec::new(), random: seed.max(1) };
        let inside = Arc::new(Mutex::new(inside));
        let task = tokio::spawn(accept(listener, Arc::clone(&inside)));
        Proxy { address, inside, task: Mutex::new(Some(task)) }
    }

    /// `http://127.0.0.1:PORT`
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn script(&self, script: Script) {
        self.inside.lock().unwrap().scripts.push(script);
    }

    /// From now on everything passes.
    pub fn clear(&self) {
        self.inside.lock().unwrap().scripts.clear();
    }

    /// Connections are refused, and those that are open are closed, until [`Proxy::up`].
    pub fn down(&self) {
        if let Some(task) = self.task.lock().unwrap().take() {
            task.abort();
        }
    }

    pub async fn up(&self) {
        // The port may be held for a moment by the listener that is being dropped.
        let mut tries = 0;
        let listener = loop {
            match TcpListener::bind(self.address).await {
                Ok(listener) => break listener,
                Err(error) if tries > 100 => panic!("{} again: {error}", self.address),
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
            tries += 1;
        };
        *self.task.lock().unwrap() = Some(tokio::spawn(accept(listener, Arc::clone(&self.inside))));
    }

    /// Every request so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.inside.lock().unwrap().seen.clone()
    }

    /// Requests of this method (`*`: any) whose path and query contain `path`.
    pub fn count(&self, method: &str, path: &str) -> usize {
        let matching = |seen: &&Seen| (method == "*" || seen.method == method) && seen.path.contains(path);
        self.inside.lock().unwrap().seen.iter().filter(matching).count()
    }

    pub fn forget_seen(&self) {
        self.inside.lock().unwrap().seen.clear();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.down();
    }
}

async fn accept(listener: TcpListener, inside: Arc<Mutex<Inside>>) {
    // Dropped with this task: every connection ends with it.
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((client, _)) = accepted else { return };
                let inside = Arc::clone(&inside);
                connections.spawn(async move { let _ = serve(client, inside).await; });
            }
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
        }
    }
}

struct Message {
    first_line: String,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

async fn serve(client: TcpStream, inside: Arc<Mutex<Inside>>) -> io::Result<()> {
    client.set_nodelay(true)?;
    let mut client = BufReader::new(client);
    while let Some(request) = read(&mut client, false).await? {
        let mut words = request.first_line.split(' ');
        let mut seen = Seen {
            method: words.next().unwrap_or_default().to_owned(),
            path: words.next().unwrap_or_default().to_owned(),
            body: String::from_utf8_lossy(&request.body).into_owned(),
            forwarded: true,
        };
        let (fault, server) = {
            let mut inside = inside.lock().unwrap();
            let fault = inside.fault(&seen);
            seen.forwarded = !matches!(fault, Some(Fault::Answer { .. } | Fault::ResetBefore));
            inside.seen.push(seen);
            (fault, inside.server)
        };
        match fault {
            Some(Fault::Answer { status, headers, body }) => {
                let mut text = format!("HTTP/1.1 {status} Fault\r\ncontent-type: application/json\r\n");
                for (name, value) in headers {
                    text.push_str(&format!("{name}: {value}\r\n"));
                }
                text.push_str(&format!("content-length: {}\r\n\r\n{body}", body.len()));
                client.get_mut().write_all(text.as_bytes()).await?;
                continue;
            }
            Some(Fault::ResetBefore) => return reset(client),
            _ => {}
        }
        let answer = forward(server, request).await;
        match fault {
            Some(Fault::ResetAfter) => return reset(client),
            Some(Fault::LoseAnswer { hold }) => {
                tokio::time::sleep(hold).await;
                return Ok(());
            }
            Some(Fault::Delay(time)) => tokio::time::sleep(time).await,
            _ => {}
        }
        // The server is away: to the client it is as if it had spoken with the server itself.
        let Ok(answer) = answer else { return reset(client) };
        client.get_mut().write_all(&answer).await?;
    }
    Ok(())
}

fn reset(client: BufReader<TcpStream>) -> io::Result<()> {
    client.into_inner().set_zero_linger()
}

/// The server's answer as bytes for the client, with a length of its own.
async fn forward(server: SocketAddr, request: Message) -> io::Result<Vec<u8>> {
    let mut upstream = BufReader::new(TcpStream::connect(server).await?);
    let mut head = format!("{}\r\n", request.first_line);
    for (name, value) in &request.headers {
        if !["connection", "content-length", "transfer-encoding"].contains(&name.to_ascii_lowercase().as_str()) {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
    }
    head.push_str(&format!("connection: close\r\ncontent-length: {}\r\n\r\n", request.body.len()));
    upstream.get_mut().write_all(head.as_bytes()).await?;
    upstream.get_mut().write_all(&request.body).await?;
    let no_body = request.first_line.starts_with("HEAD ");
    let answer = match read(&mut upstream, true).await? {
        Some(answer) => answer,
        None => return Err(io::ErrorKind::UnexpectedEof.into()),
    };
    let mut bytes = format!("{}\r\n", answer.first_line).into_bytes();
    for (name, value) in &answer.headers {
        if !["connection", "content-length", "transfer-encoding"].contains(&name.to_ascii_lowercase().as_str()) {
            bytes.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
        }
    }
    bytes.extend_from_slice(format!("content-length: {}\r\n\r\n", answer.body.len()).as_bytes());
    if !no_body {
        bytes.extend_from_slice(&answer.body);
    }
    Ok(bytes)
}

/// One message; `None` at the end of the connection. An answer without a length goes to the end.
async fn read(stream: &mut BufReader<TcpStream>, is_answer: bool) -> io::Result<Option<Message>> {
    let Some(first_line) = line(stream).await? else { return Ok(None) };
    let mut headers = Vec::new();
    while let Some(header) = line(stream).await? {
        if header.is_empty() {
            break;
        }
        if let Some((name, value)) = header.split_once(':') {
            headers.push((name.to_owned(), value.trim().to_owned()));
        }
    }
    let header =
        |wanted: &str| headers.iter().find(|(name, _)| name.eq_ignore_ascii_case(wanted)).map(|(_, value)| value);
    let mut body = Vec::new();
    if header("transfer-encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked")) {
        loop {
            let size = line(stream).await?.unwrap_or_default();
            let size = usize::from_str_radix(size.split(';').next().unwrap_or_default().trim(), 16);
            let size = size.map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
            let start = body.len();
            body.resize(start + size, 0);
            stream.read_exact(&mut body[start..]).await?;
            line(stream).await?;
            if size == 0 {
                break;
            }
        }
    } else if let Some(length) = header("content-length") {
        body.resize(length.parse().map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?, 0);
        stream.read_exact(&mut body).await?;
    } else if is_answer {
        stream.read_to_end(&mut body).await?;
    }
    Ok(Some(Message { first_line, headers, body }))
}

async fn line(stream: &mut BufReader<TcpStream>) -> io::Result<Option<String>> {
    let mut line = String::new();
    if stream.read_line(&mut line).await? == 0 {
        return Ok(None);
    }
    Ok(Some(line.trim_end_matches(['\r', '\n']).to_owned()))
}
