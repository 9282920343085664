//! PostgreSQL: one server per version shared by the tests of a process, or one's own to stop and kill.
//!
//! Role `tidegate` (password `tidegate`, REPLICATION, by SCRAM) owns each database; role `postgres` is trusted.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::sync::OnceCell;
use tokio_postgres::{Client, NoTls};

use super::process::{Folder, Launch, Process, cache_dir, free_port, install, run};
use super::wait::eventually;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// What the Linux distribution ships: 15 on Debian 12.
    Distribution,
    /// The newest there is without compiling: 18.
    Newest,
}

impl Version {
    pub const ALL: [Version; 2] = [Version::Distribution, Version::Newest];

    /// The folder of `postgres`, `initdb`, `pgbench` …, installed when missing.
    pub fn bin(self) -> PathBuf {
        match self {
            Version::Distribution => {
                install("install-postgresql.sh", &["distribution"]);
                let versions = std::fs::read_dir("/usr/lib/postgresql").expect("the distribution's PostgreSQL");
                let newest = versions
                    .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
                    .filter(|version| Path::new(&format!("/usr/lib/postgresql/{version}/bin/initdb")).exists())
                    .max()
                    .expect("install-postgresql.sh leaves one");
                PathBuf::from(format!("/usr/lib/postgresql/{newest}/bin"))
            }
            Version::Newest => {
                install("install-postgresql.sh", &["newest"]);
                cache_dir().join("postgresql-newest/bin")
            }
        }
    }
}

/// How a server of one's own differs from the shared ones.
#[derive(Clone, Default)]
pub struct Options {
    /// `ssl = on`, with a certificate for 127.0.0.1 and localhost signed by [`Postgres::root_certificate`].
    pub tls: bool,
    /// TCP connections without TLS are refused.
    pub tls_only: bool,
    /// More settings: `("wal_keep_size", "64MB")`.
    pub settings: Vec<(String, String)>,
}

pub struct Postgres {
    version: Version,
    bin: PathBuf,
    port: u16,
    // The process before the folder: dropped in this order.
    process: Mutex<Option<Process>>,
    folder: Folder,
}

static SHARED: [OnceCell<Postgres>; 2] = [const { OnceCell::const_new() }; 2];
static DATABASES: AtomicU32 = AtomicU32::new(1);

impl Postgres {
    /// The server that all tests of this process share.
    pub async fn shared(version: Version) -> &'static Postgres {
        SHARED[version as usize].get_or_init(|| Postgres::own(version)).await
    }

    /// A server of one's own, for tests that stop or kill it.
    pub async fn own(version: Version) -> Postgres {
        Postgres::own_with(version, Options::default()).await
    }

    pub async fn own_with(version: Version, options: Options) -> Postgres {
        let server = tokio::task::spawn_blocking(move || Postgres::create(version, &options)).await.expect("created");
        server.start().await;
        let admin = server.connect_as("postgres", "postgres").await;
        let role = "CREATE ROLE tidegate LOGIN REPLICATION PASSWORD 'tidegate'";
        admin.batch_execute(role).await.expect("role tidegate");
        server
    }

    fn create(version: Version, options: &Options) -> Postgres {
        let folder = Folder::new("postgres");
        let bin = version.bin();
        let data = folder.path().join("data");
        let user = give(folder.path());
        let mut initdb = as_user(user.as_deref(), &bin.join("initdb"));
        run(initdb.current_dir(folder.path()).arg("-D").arg(&data).args(["-U", "postgres", "-A", "trust"]).args([
            "--no-sync",
            "--encoding=UTF8",
            "--locale=C.UTF-8",
        ]));
        let port = free_port();
        let mut conf = format!(
            "listen_addresses = '127.0.0.1'\nport = {port}\nunix_socket_directories = '{}'\nwal_level = logical\n\
             max_replication_slots = 500\nmax_wal_senders = 100\nmax_connections = 400\nshared_buffers = 64MB\n\
             max_wal_size = 1GB\nlog_line_prefix = '%m [%p] %d '\npassword_encryption = 'scram-sha-256'\n\
             timezone = 'UTC'\nlog_timezone = 'UTC'\n",
            folder.path().display()
        );
        if options.tls || options.tls_only {
            certificate(folder.path());
            give(&folder.path().join("server.key"));
            conf += &format!(
                "ssl = on\nssl_cert_file = '{0}/server.crt'\nssl_key_file = '{0}/server.key'\n",
                folder.path().display()
            );
        }
        for (name, value) in &options.settings {
            conf += &format!("{name} = '{}'\n", value.replace('\'', "''"));
        }
        let host = if options.tls_only { "hostssl" } else { "host" };
        let hba = format!(
            "local all all trust\n{host} all postgres 127.0.0.1/32 trust\n{host} replication postgres 127.0.0.1/32 trust\n\
             {host} all all 127.0.0.1/32 scram-sha-256\n{host} replication all 127.0.0.1/32 scram-sha-256\n"
        );
        append(&data.join("postgresql.conf"), &conf);
        std::fs::write(data.join("pg_hba.conf"), hba).expect("pg_hba.conf");
        Postgres { version, bin, port, process: Mutex::new(None), folder }
    }

    /// A hot standby of `primary`, on the same machine; from PostgreSQL 17 on it synchronizes failover slots.
    pub async fn standby_of(primary: &Postgres) -> Postgres {
        let admin = primary.connect_as("postgres", "postgres").await;
        let sql = "SELECT pg_create_physical_replication_slot('standby')";
        admin.batch_execute(sql).await.expect("a slot for the standby");
        let folder = Folder::new("standby");
        let user = give(folder.path());
        let data = folder.path().join("data");
        let (bin, from) = (primary.bin.clone(), primary.port);
        let mut copying = as_user(user.as_deref(), &bin.join("pg_basebackup"));
        copying.current_dir(folder.path()).arg("-D").arg(&data).args([
            "-h",
            "127.0.0.1",
            "-U",
            "postgres",
            "-c",
            "fast",
        ]);
        copying.args(["-p", &from.to_string()]);
        tokio::task::spawn_blocking(move || run(&mut copying)).await.expect("a base backup");
        let port = free_port();
        let mut conf = format!(
            "port = {port}\nunix_socket_directories = '{}'\nprimary_slot_name = 'standby'\nhot_standby_feedback = on\n\
             primary_conninfo = 'host=127.0.0.1 port={from} user=postgres dbname=postgres'\n\
             wal_receiver_status_interval = 1\n",
            folder.path().display()
        );
        if primary.version == Version::Newest {
            conf += "sync_replication_slots = on\n";
        }
        append(&data.join("postgresql.conf"), &conf);
        std::fs::write(data.join("standby.signal"), "").expect("standby.signal");
        let standby = Postgres { version: primary.version, bin, port, process: Mutex::new(None), folder };
        standby.start().await;
        standby
    }

    /// Starts it (again, on the same port and data) and waits until it answers.
    pub async fn start(&self) {
        let user = user();
        let data = self.folder.path().join("data");
        let mut launch = match &user {
            Some(user) => Launch::new("postgres", "setpriv").args(drop_to(user)).arg(self.bin.join("postgres")),
            None => Launch::new("postgres", self.bin.join("postgres")),
        };
        launch = launch.arg("-D").arg(data).dir(self.folder.path()).log(self.log_path()).end("QUIT");
        let process = launch.start();
        eventually(Duration::from_secs(60), "PostgreSQL answers", async || {
            if let Some(code) = process.exited() {
                panic!("postgres ended with {code}:\n{}", process.log_end(20));
            }
            self.try_connect("postgres", "postgres").await.map(drop)
        })
        .await;
        *self.process.lock().expect("not poisoned") = Some(process);
    }

    /// A fast shutdown (SIGINT); panics when it takes over a minute.
    pub async fn stop(&self) {
        let process = self.process.lock().expect("not poisoned").take().expect("running");
        process.signal("INT");
        process.wait(Duration::from_secs(60)).await;
    }

    /// `kill -9` of the server and all its backends at once, as when the machine goes.
    pub async fn kill9(&self) {
        let process = self.process.lock().expect("not poisoned").take().expect("running");
        process.signal("STOP"); // it starts no new children while they are counted
        let children = children(process.pid());
        process.signal("KILL");
        process.wait(Duration::from_secs(10)).await;
        let _ = Command::new("kill").arg("-KILL").args(&children).output(); // some have gone by themselves
        eventually(Duration::from_secs(10), "the backends are gone", async || {
            children.iter().all(|pid| !Path::new("/proc").join(pid).exists())
        })
        .await;
    }

    pub fn version(&self) -> Version {
        self.version
    }

    /// The folder of the programs: `pgbench`, `pg_recvlogical`, `psql` …
    pub fn bin(&self) -> &Path {
        &self.bin
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// The id of the postmaster, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.process.lock().expect("not poisoned").as_ref().map(Process::pid)
    }

    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.log_path()).unwrap_or_default()).into_owned()
    }

    /// The certificate that signed the server's, with [`Options::tls`].
    pub fn root_certificate(&self) -> PathBuf {
        self.folder.path().join("root.crt")
    }

    /// A fresh database, owned by role `tidegate`, whose name begins with `name`.
    pub async fn database(&self, name: &str) -> Database<'_> {
        let name = format!("{name}_{}", DATABASES.fetch_add(1, Ordering::Relaxed));
        let admin = self.connect_as("postgres", "postgres").await;
        admin.batch_execute(&format!("CREATE DATABASE \"{name}\" OWNER tidegate")).await.expect("create database");
        Database { server: self, name }
    }

    /// A connection without TLS as this role (password `tidegate`); its task ends with the test's runtime.
    pub async fn connect_as(&self, role: &str, database: &str) -> Client {
        self.try_connect(role, database)
            .await
            .unwrap_or_else(|error| panic!("connect to {database} as {role}: {error}"))
    }

    pub async fn try_connect(&self, role: &str, database: &str) -> Result<Client, tokio_postgres::Error> {
        let mut config = tokio_postgres::Config::new();
        config.user(role).password("tidegate").dbname(database).connect_timeout(Duration::from_secs(5));
        // By the socket for the trusted role: so it works on a server that wants TLS, too.
        if role == "postgres" {
            config.host_path(self.folder.path())
        } else {
            config.host("127.0.0.1")
        };
        let (client, connection) = config.port(self.port).connect(NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    fn log_path(&self) -> PathBuf {
        self.folder.path().join("log")
    }
}

/// One database of a server.
pub struct Database<'a> {
    pub server: &'a Postgres,
    pub name: String,
}

impl Database<'_> {
    /// `postgres://tidegate:tidegate@127.0.0.1:PORT/NAME`.
    pub fn url(&self) -> String {
        self.url_at(self.server.port)
    }

    /// The same behind another port: a gate's, a standby's.
    pub fn url_at(&self, port: u16) -> String {
        format!("postgres://tidegate:tidegate@127.0.0.1:{port}/{}", self.name)
    }

    /// The same without the password, which is `tidegate`.
    pub fn url_without_password(&self) -> String {
        format!("postgres://tidegate@127.0.0.1:{}/{}", self.server.port, self.name)
    }

    /// As role `tidegate`, the owner.
    pub async fn connect(&self) -> Client {
        self.server.connect_as("tidegate", &self.name).await
    }

    /// As the superuser.
    pub async fn connect_as_superuser(&self) -> Client {
        self.server.connect_as("postgres", &self.name).await
    }

    /// Runs one or more statements as the owner.
    pub async fn execute(&self, sql: &str) {
        self.connect().await.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }
}

/// The account that servers run under when the tests are root's, who PostgreSQL refuses.
fn user() -> Option<String> {
    if run(Command::new("id").arg("-u")).trim_end() != "0" {
        return None;
    }
    let postgres = Command::new("id").args(["-u", "postgres"]).output().is_ok_and(|output| output.status.success());
    Some(if postgres { "postgres" } else { "nobody" }.into())
}

/// Makes `path` the server account's own.
fn give(path: &Path) -> Option<String> {
    let user = user();
    if let Some(user) = &user {
        run(Command::new("chown").arg(user).arg(path));
    }
    user
}

fn drop_to(user: &str) -> [String; 3] {
    let group = run(Command::new("id").args(["-g", user])).trim_end().to_owned();
    [format!("--reuid={user}"), format!("--regid={group}"), "--clear-groups".into()]
}

fn as_user(user: Option<&str>, program: &Path) -> Command {
    match user {
        Some(user) => {
            let mut command = Command::new("setpriv");
            command.args(drop_to(user)).arg(program);
            command
        }
        None => Command::new(program),
    }
}

fn children(pid: u32) -> Vec<String> {
    let parent_of = |stat: &str| stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse::<u32>().ok();
    let processes = std::fs::read_dir("/proc").expect("/proc").filter_map(|entry| {
        let name = entry.ok()?.file_name().into_string().ok()?;
        let stat = std::fs::read_to_string(format!("/proc/{name}/stat")).ok()?;
        (parent_of(&stat) == Some(pid)).then_some(name)
    });
    processes.collect()
}

fn append(path: &Path, text: &str) {
    let mut whole = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    whole += text;
    std::fs::write(path, whole).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

/// `root.crt` and, signed by it, `server.crt` with `server.key`, in `folder`.
pub fn certificate(folder: &Path) {
    let openssl = |args: &str| run(Command::new("openssl").current_dir(folder).args(args.split(' ')));
    let extension = "basicConstraints=CA:FALSE\nsubjectAltName=DNS:localhost,IP:127.0.0.1\n";
    std::fs::write(folder.join("server.ext"), extension).expect("server.ext");
    openssl(
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 -subj /CN=root -keyout root.key -out root.crt",
    );
    openssl(
        "req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=localhost -keyout server.key -out server.csr",
    );
    openssl(
        "x509 -req -in server.csr -CA root.crt -CAkey root.key -CAcreateserial -days 30 -extfile server.ext -out server.crt",
    );
    run(Command::new("chmod").arg("600").arg(folder.join("server.key")));
}

#[tokio::test]
async fn every_version_serves_a_fresh_database_with_logical_replication() {
    for version in Version::ALL {
        let server = Postgres::shared(version).await;
        let database = server.database("fresh").await;
        let client = database.connect().await;
        let row = client.query_one("SELECT current_user::text, current_setting('wal_level')", &[]).await.unwrap();
        assert_eq!((row.get::<_, &str>(0), row.get::<_, &str>(1)), ("tidegate", "logical"));
        client.query_one("SELECT pg_create_logical_replication_slot($1, 'pgoutput')", &[&database.name]).await.unwrap();
        client.execute("SELECT pg_drop_replication_slot($1)", &[&database.name]).await.unwrap();
    }
}

#[tokio::test]
async fn a_killed_server_comes_back_with_its_rows() {
    let server = Postgres::own_with(Version::Distribution, Options { tls: true, ..Options::default() }).await;
    let database = server.database("killed").await;
    database.execute("CREATE TABLE t (id int); INSERT INTO t VALUES (1)").await;
    server.kill9().await;
    assert!(server.try_connect("tidegate", &database.name).await.is_err());
    server.start().await;
    let client = database.connect().await;
    assert_eq!(client.query_one("SELECT count(*) FROM t", &[]).await.unwrap().get::<_, i64>(0), 1);
    drop(client);
    server.stop().await;
}
