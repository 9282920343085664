//! Getting to a server, and staying there: TLS, SCRAM, the role's own settings, a server that waits for an answer.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tidegate::datastore::DatastoreSettings;
use tidegate::pipeline::ConnectorState;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::support::capture::{World, wait_for_equality};
use crate::support::postgres::{Options, certificate};
use crate::support::{Database, Postgres, Version, eventually};

/// Passes connections on to a server, under another address; with a folder as one who stands between: TLS ends there,
/// under a certificate of its own.
struct Relay(std::net::SocketAddr);

impl Relay {
    async fn on(ip: &str, port: u16, between: Option<&Path>) -> Relay {
        let listener = TcpListener::bind((ip, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let acceptor = between.map(|folder| {
            certificate(folder);
            let own = CertificateDer::from_pem_file(folder.join("server.crt")).unwrap();
            let key = PrivateKeyDer::from_pem_file(folder.join("server.key")).unwrap();
            let settings = rustls::ServerConfig::builder().with_no_client_auth().with_single_cert(vec![own], key);
            tokio_rustls::TlsAcceptor::from(Arc::new(settings.unwrap()))
        });
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let mut server = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    let Some(acceptor) = acceptor else {
                        let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                        return;
                    };
                    // The request for TLS is the server's to answer.
                    let mut request = [0; 8];
                    client.read_exact(&mut request).await.unwrap();
                    server.write_all(&request).await.unwrap();
                    let answer = server.read_u8().await.unwrap();
                    client.write_u8(answer).await.unwrap();
                    let trusting = DatastoreSettings::from_url("postgres://x@h/d?sslmode=require").unwrap();
                    let connector = tokio_rustls::TlsConnector::from(Arc::new(trusting.tls_config().unwrap().unwrap()));
                    let name = ServerName::try_from("localhost").unwrap();
                    let (Ok(mut client), Ok(mut server)) =
                        (acceptor.accept(client).await, connector.connect(name, server).await)
                    else {
                        return;
                    };
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                });
            }
        });
        Relay(address)
    }

    fn url(&self, database: &Database<'_>) -> String {
        database.url().replace(&format!("127.0.0.1:{}", database.server.port()), &self.0.to_string())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_spoken_and_an_authority_or_a_name_that_is_not_trusted_is_refused() {
    let options = Options { tls_only: true, ..Default::default() };
    let server = Postgres::own_with(Version::Distribution, options).await;
    let database = server.database("tls").await;
    let owner = database.connect_as_superuser().await;
    owner.batch_execute("CREATE TABLE t (id int PRIMARY KEY); ALTER TABLE t OWNER TO tidegate").await.unwrap();
    let mut world = World::new(&database, &[r"public\.t"]);
    let root = server.root_certificate();
    world.url = format!("{}?sslmode=verify-full&sslrootcert={}", database.url(), root.display());
    let capture = world.start().await;
    owner.batch_execute("INSERT INTO t VALUES (1)").await.unwrap();
    world.wait_for_changes("shop.public.t", 1).await;
    let sql = "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_replication USING (pid) WHERE ssl";
    // The row may have come with the snapshot, before the stream.
    eventually(Duration::from_secs(30), "a stream over TLS", async || {
        owner.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 1
    })
    .await;
    capture.stop().await.unwrap();

    let elsewhere = tempfile::tempdir().unwrap();
    certificate(elsewhere.path());
    let other = elsewhere.path().join("root.crt");
    let by_another_name = Relay::on("127.0.0.2", server.port(), None).await.url(&database);
    for (url, mode) in [
        (database.url(), "sslmode=verify-full".to_owned()),
        (database.url(), format!("sslmode=verify-full&sslrootcert={}", other.display())),
        (database.url(), format!("sslmode=verify-ca&sslrootcert={}", other.display())),
        (by_another_name.clone(), format!("sslmode=verify-full&sslrootcert={}", root.display())),
    ] {
        world.url = format!("{url}?{mode}");
        let fault = world.start().await.ended().await.unwrap_err();
        assert!(fault.message.contains("TLS: invalid peer certificate"), "{url} {mode}: {fault}");
    }
    world.url = format!("{by_another_name}?sslmode=verify-ca&sslrootcert={}", root.display());
    let capture = world.start_streaming().await;
    capture.stop().await.unwrap();
    world.url = format!("{}?sslmode=disable", database.url());
    let fault = world.start().await.ended().await.unwrap_err();
    assert!(fault.message.contains("no encryption") || fault.message.contains("pg_hba"), "{fault}");
}

/// With `sslmode=require` any certificate will do: it is SCRAM that notices who stands between.
#[tokio::test(flavor = "multi_thread")]
async fn scram_is_bound_to_the_connection_so_that_nobody_stands_between() {
    let options = Options { tls: true, ..Options::default() };
    let server = Postgres::own_with(Version::Distribution, options).await;
    let database = server.database("bound").await;
    database.execute("CREATE TABLE t (id int PRIMARY KEY)").await;
    let mut world = World::new(&database, &[r"public\.t"]);
    world.url = format!("{}?sslmode=require&channel_binding=require", database.url());
    let capture = world.start_streaming().await;
    capture.stop().await.unwrap();

    let folder = tempfile::tempdir().unwrap();
    let between = Relay::on("127.0.0.1", server.port(), Some(folder.path())).await.url(&database);
    for (url, wanted) in [
        (format!("{between}?sslmode=require"), "channel binding"),
        (format!("{between}?sslmode=require&channel_binding=require"), "channel binding"),
        (format!("{}?sslmode=disable&channel_binding=require", database.url()), "'require'"),
        (format!("{}?sslmode=require", database.url().replace(":tidegate@", ":wrong@")), "28P01"),
    ] {
        world.url = url;
        let fault = world.start().await.ended().await.unwrap_err();
        assert!(fault.message.contains(wanted), "{}: {fault}", world.url);
    }
    // Who does not mind is let through.
    world.url = format!("{between}?sslmode=require&channel_binding=disable");
    let capture = world.start_streaming().await;
    capture.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_needs_a_person() {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("password").await;
    let mut world = World::new(&database, &[".*"]);
    world.url = database.url().replace(":tidegate@", ":wrong@");
    let fault = world.start().await.ended().await.unwrap_err();
    assert!(fault.message.contains("28P01"), "{fault}");
}

#[tokio::test(flavor = "multi_thread")]
async fn several_hosts_are_refused_by_name_and_none_is_passed_over() {
    let mut world = World::new(&Postgres::shared(Version::Distribution).await.database("hosts").await, &[".*"]);
    world.url = world.url.replace("127.0.0.1", "elsewhere:5432,127.0.0.1");
    let datastore = DatastoreSettings::from_url(&world.url).unwrap();
    let fault = world.settings.address(&datastore).unwrap_err();
    assert!(fault.message.contains("2 hosts"), "{fault}");
}

/// The walsender that streams.
async fn sender(client: &tokio_postgres::Client, slot: &str) -> Option<i32> {
    let sql = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = $1";
    client.query_one(sql, &[&slot]).await.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_is_answered_while_nobody_takes_what_it_sends() {
    let options = Options { settings: vec![("wal_sender_timeout".into(), "2s".into())], ..Options::default() };
    let server = Postgres::own_with(Version::Distribution, options).await;
    let database = server.database("answered").await;
    database.execute("CREATE TABLE t (id int PRIMARY KEY, v text)").await;
    let (world, capture) = World::streaming(&database, &[r"public\.t"]).await;
    let client = database.connect().await;
    let before = sender(&client, &world.settings.slot).await.unwrap();
    capture.pause();
    let paused = Instant::now();
    // More than is received ahead: the rest stays in the server's hands.
    client.batch_execute("INSERT INTO t SELECT i, repeat('x', 1000) FROM generate_series(1, 60000) i").await.unwrap();
    while paused.elapsed() < Duration::from_secs(8) {
        assert_eq!(sender(&client, &world.settings.slot).await, Some(before), "{}", server.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    capture.resume();
    wait_for_equality(&world, &client, "t").await;
    capture.stop().await.unwrap();
    assert!(!server.log().contains("replication timeout"), "{}", server.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_can_shut_down_when_a_pause_came_while_the_stream_was_opened() {
    let server = Postgres::own(Version::Distribution).await;
    let database = server.database("opened").await;
    database.execute("CREATE TABLE t (id int PRIMARY KEY)").await;
    let (world, gate) = World::gated(&database, &[r"public\.t"], "START_REPLICATION").await;
    let capture = world.start().await;
    gate.reached().await;
    capture.pause();
    eventually(Duration::from_secs(30), "paused", async || capture.status.state() == ConnectorState::Paused).await;
    gate.open();
    let client = database.connect().await;
    eventually(Duration::from_secs(30), "streamed", async || sender(&client, &world.settings.slot).await.is_some())
        .await;
    client.batch_execute("INSERT INTO t VALUES (1)").await.unwrap();
    drop(client);
    server.stop().await;
    server.start().await;
    capture.resume();
    world.wait_for_changes("shop.public.t", 1).await;
    capture.stop().await.unwrap();
}

/// Who holds the slot, by its lock.
async fn holders(client: &tokio_postgres::Client) -> i64 {
    let sql = "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database \
               WHERE locktype = 'advisory' AND datname = current_database()";
    client.query_one(sql, &[]).await.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_that_a_role_has_by_default_cut_no_snapshot_short() {
    for version in Version::ALL {
        let server = Postgres::shared(version).await;
        let database = server.database("limits").await;
        database.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)").await;
        let admin = database.connect_as_superuser().await;
        let mut limits = vec!["statement_timeout", "idle_in_transaction_session_timeout", "idle_session_timeout"];
        if version == Version::Newest {
            limits.push("transaction_timeout");
        }
        for limit in limits {
            let sql = format!("ALTER ROLE tidegate IN DATABASE \"{}\" SET {limit} = '1s'", database.name);
            admin.batch_execute(&sql).await.unwrap();
        }
        let (world, gate) = World::gated(&database, &[r"public\.t"], "COPY (").await;
        let capture = world.start().await;
        gate.reached().await;
        let reached = Instant::now();
        while reached.elapsed() < Duration::from_secs(3) {
            assert_eq!(holders(&admin).await, 1, "{:?}", capture.status.last_error());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        gate.open();
        capture.streaming().await;
        assert_eq!(world.changes("shop.public.t").await.len(), 1);
        assert!(capture.status.last_error().is_none(), "{:?}", capture.status.last_error());
        capture.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_on_transactions_ends_no_stream_in_the_middle_of_one() {
    let server = Postgres::shared(Version::Newest).await;
    let database = server.database("long").await;
    database.execute("CREATE TABLE t (id int PRIMARY KEY, v text)").await;
    let admin = database.connect_as_superuser().await;
    let limit = format!("ALTER ROLE tidegate IN DATABASE \"{}\" SET transaction_timeout = '1s'", database.name);
    admin.batch_execute(&limit).await.unwrap();
    let (world, capture) = World::streaming(&database, &[r"public\.t"]).await;
    let before = sender(&admin, &world.settings.slot).await.unwrap();
    capture.pause();
    let paused = Instant::now();
    // More than is received ahead: the server is in the middle of it for as long as the pause lasts.
    admin.batch_execute("INSERT INTO t SELECT i, repeat('x', 1000) FROM generate_series(1, 60000) i").await.unwrap();
    while paused.elapsed() < Duration::from_secs(6) {
        assert_eq!(sender(&admin, &world.settings.slot).await, Some(before), "{:?}", capture.status.last_error());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    capture.resume();
    wait_for_equality(&world, &admin, "t").await;
    assert!(capture.status.last_error().is_none(), "{:?}", capture.status.last_error());
    capture.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_a_policy_hides_from_the_role_are_missed_by_name() {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("policy").await;
    let owner = database.connect_as_superuser().await;
    let world = World::new(&database, &[r"public\.t"]);
    owner
        .batch_execute(&format!(
            "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1), (2); \
             ALTER TABLE t ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON t USING (id < 2); \
             GRANT SELECT ON t TO tidegate; CREATE PUBLICATION {} FOR TABLE t",
            world.settings.publication
        ))
        .await
        .unwrap();
    let plan = world.plan().await;
    assert!(plan.problems.iter().any(|problem| problem.contains("row-level security")), "{:?}", plan.problems);
    assert!(plan.dba_sql.iter().any(|sql| sql.contains("BYPASSRLS")), "{:?}", plan.dba_sql);
    let fault = world.start().await.ended().await.unwrap_err();
    assert!(fault.message.contains("row-level security") && fault.message.contains("BYPASSRLS"), "{fault}");
    owner.batch_execute("ALTER TABLE t DISABLE ROW LEVEL SECURITY").await.unwrap();
    let capture = world.start_streaming().await;
    wait_for_equality(&world, &owner, "t").await;
    capture.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_capture_is_starting_until_its_snapshot_or_stream_begins() {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("starting").await;
    database.execute("CREATE TABLE t (id int PRIMARY KEY)").await;
    let mut writer = database.connect().await;
    // A slot is made only when every transaction that was under way has ended.
    let open = writer.transaction().await.unwrap();
    open.batch_execute("INSERT INTO t VALUES (1)").await.unwrap();
    let world = World::new(&database, &[r"public\.t"]);
    let capture = world.start().await;
    capture.making_slot().await;
    let waiting = Instant::now();
    while waiting.elapsed() < Duration::from_secs(3) {
        assert_eq!(capture.status.state(), ConnectorState::Starting);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    open.commit().await.unwrap();
    eventually(Duration::from_secs(30), "running", async || capture.status.state() == ConnectorState::Running).await;
    assert_eq!(capture.status.facts()["stage"], "streaming");
    capture.stop().await.unwrap();
}
