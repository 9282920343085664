//! The sockets of the worker's HTTP. Every connection has an end, and there are only so many: one that sends no
//! request, or takes no answer, is closed; none keeps the worker from stopping.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How it deals with its clients.
#[derive(Clone, Copy)]
pub struct Limits {
    /// Open at a time; further ones wait until one is closed.
    pub connections: usize,
    /// For a request's head to come in whole, or for the next request to begin.
    pub head: Duration,
    /// After this a connection takes no further request, so that one of which nothing is read ends too.
    pub age: Duration,
    /// For the request under way to be answered and the answer to be read, from then on.
    pub last: Duration,
}

/// Serves until told to stop, and then for as long as requests under way take; whoever tells it bounds that.
pub async fn serve(listener: TcpListener, router: Router, limits: Limits, stop: CancellationToken) {
    let places = Arc::new(Semaphore::new(limits.connections));
    let open = TaskTracker::new();
    // Cut off with this task, should it be dropped before they have ended.
    let cut = CancellationToken::new();
    let _cut = cut.clone().drop_guard();
    loop {
        let next = async {
            let place = places.clone().acquire_owned().await;
            (listener.accept().await, place)
        };
        let (accepted, place) = tokio::select! {
            () = stop.cancelled() => break,
            next = next => next,
        };
        match accepted {
            Ok((stream, _)) => {
                let (router, stop, cut) = (router.clone(), stop.clone(), cut.clone());
                open.spawn(async move {
                    let _place = place;
                    tokio::select! {
                        () = cut.cancelled() => {}
                        () = converse(stream, router, limits, stop) => {}
                    }
                });
            }
            Err(error) => {
                // Out of file descriptors, most likely.
                tracing::warn!("the worker's HTTP can't take a connection: {error}");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
    drop(listener);
    open.close();
    open.wait().await;
}

async fn converse(stream: TcpStream, router: Router, limits: Limits, stop: CancellationToken) {
    let _ = stream.set_nodelay(true);
    let mut server = http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(limits.head);
    let mut connection =
        std::pin::pin!(server.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)));
    let aged = async {
        tokio::select! {
            () = stop.cancelled() => {}
            () = tokio::time::sleep(limits.age) => {}
        }
    };
    tokio::select! {
        // What goes wrong with one client is that client's.
        _ = connection.as_mut() => return,
        () = aged => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = timeout(limits.last, connection).await;
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const SOON: Duration = Duration::from_secs(20);
    const LIMITS: Limits = Limits {
        connections: 2,
        head: Duration::from_millis(300),
        age: Duration::from_secs(60),
        last: Duration::from_millis(300),
    };

    async fn served(limits: Limits) -> (std::net::SocketAddr, CancellationToken, tokio::task::JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let much = "x".repeat(64 << 20);
        let router = Router::new().route("/", get(async || "here")).route("/much", get(async move || much.clone()));
        let stop = CancellationToken::new();
        (address, stop.clone(), tokio::spawn(serve(listener, router, limits, stop)))
    }

    async fn answer(address: std::net::SocketAddr) -> String {
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        timeout(SOON, client.read_to_string(&mut answer)).await.expect("in time").unwrap();
        answer
    }

    #[tokio::test]
    async fn clients_that_say_nothing_or_half_a_word_do_not_keep_others_out() {
        let (address, stop, task) = served(LIMITS).await;
        let _mute = TcpStream::connect(address).await.unwrap();
        let mut halfway = TcpStream::connect(address).await.unwrap();
        halfway.write_all(b"GET / HTTP/1.1\r\nHo").await.unwrap();
        assert!(answer(address).await.ends_with("here"));
        stop.cancel();
        timeout(SOON, task).await.expect("in time").unwrap();
    }

    #[tokio::test]
    async fn a_client_that_reads_no_answer_is_let_go_after_its_time_and_at_the_end() {
        let mut limits = LIMITS;
        limits.connections = 1;
        limits.age = Duration::from_millis(300);
        let (address, stop, task) = served(limits).await;
        let mut deaf = TcpStream::connect(address).await.unwrap();
        deaf.write_all(b"GET /much HTTP/1.1\r\nHost: here\r\n\r\n").await.unwrap();
        assert!(answer(address).await.ends_with("here"));
        let mut again = TcpStream::connect(address).await.unwrap();
        again.write_all(b"GET /much HTTP/1.1\r\nHost: here\r\n\r\n").await.unwrap();
        stop.cancel();
        timeout(SOON, task).await.expect("in time").unwrap();
    }
}
