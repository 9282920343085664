//! A door in front of a server that stays shut, once, where a client says certain words: so a test does something at
//! just that moment.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

pub struct Gate {
    pub port: u16,
    reached: Arc<Semaphore>,
    opened: Arc<Semaphore>,
}

impl Gate {
    /// Passes bytes on to `port` of 127.0.0.1; before the first client bytes with `words` it waits for [`Gate::open`].
    pub async fn before(port: u16, words: &'static str) -> Gate {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let gate = Gate {
            port: listener.local_addr().unwrap().port(),
            reached: Arc::new(Semaphore::new(0)),
            opened: Arc::new(Semaphore::new(0)),
        };
        let (reached, opened) = (gate.reached.clone(), gate.opened.clone());
        let armed = Arc::new(AtomicBool::new(true));
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Ok(server) = TcpStream::connect(("127.0.0.1", port)).await else { continue };
                let (reached, opened, armed) = (reached.clone(), opened.clone(), armed.clone());
                tokio::spawn(async move {
                    let (mut from_client, mut to_client) = client.into_split();
                    let (mut from_server, mut to_server) = server.into_split();
                    let back = tokio::spawn(async move { tokio::io::copy(&mut from_server, &mut to_client).await });
                    let mut bytes = vec![0; 64 << 10];
                    while let Ok(count @ 1..) = from_client.read(&mut bytes).await {
                        let said = bytes[..count].windows(words.len()).any(|window| window == words.as_bytes());
                        if said && armed.swap(false, Ordering::SeqCst) {
                            reached.add_permits(1);
                            let _ = opened.acquire().await;
                        }
                        if to_server.write_all(&bytes[..count]).await.is_err() {
                            break;
                        }
                    }
                    back.abort();
                });
            }
        });
        gate
    }

    /// Waits until a client is held.
    pub async fn reached(&self) {
        let reached = tokio::time::timeout(Duration::from_secs(60), self.reached.acquire()).await;
        reached.expect("a client says it").expect("open").forget();
    }

    pub fn open(&self) {
        self.opened.add_permits(1);
    }
}
