//! Apache Kafka: one broker (KRaft, one node), shared by the tests of a process or one's own to stop and kill.

use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use tokio::sync::OnceCell;

use super::postgres::certificate;
use super::process::{Folder, Launch, Process, cache_dir, free_port, install};
use super::wait::eventually;

/// Flags that make a JVM start fast and stay small.
pub const JVM: [&str; 4] = ["-Xms64m", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"];

pub struct Kafka {
    port: u16,
    secure: bool,
    process: Mutex<Option<Process>>,
    folder: Folder,
}

static SHARED: OnceCell<Kafka> = OnceCell::const_new();
static GUARDED: OnceCell<Kafka> = OnceCell::const_new();

impl Kafka {
    /// The broker that all tests of this process share: use topic and group names of your own.
    pub async fn shared() -> &'static Kafka {
        SHARED.get_or_init(Kafka::own).await
    }

    /// A broker of one's own, for tests that stop or kill it.
    pub async fn own() -> Kafka {
        Kafka::create(false, "").await
    }

    /// One as [`Kafka::own_secure`] has it, shared, where everybody who comes over the secure listener may do only what
    /// [`Kafka::allow`] says (for one test alone), and where no topic is made by somebody's asking for it.
    pub async fn guarded() -> &'static Kafka {
        GUARDED.get_or_init(Kafka::make_guarded).await
    }

    async fn make_guarded() -> Kafka {
        let authorizer = "org.apache.kafka.metadata.authorizer.StandardAuthorizer";
        let guarded = format!(
            "authorizer.class.name={authorizer}\nsuper.users=User:ANONYMOUS\nauto.create.topics.enable=false\n"
        );
        Kafka::create(true, &guarded).await
    }

    /// Lets `tidegate` do this with every topic or group (`TOPIC READ`), or takes that back.
    pub async fn allow(&self, what: &str, allowed: bool) {
        const PROGRAM: &str = r#"
import sys
from confluent_kafka.admin import *
bootstrap, kind, operation, allowed = sys.argv[1:5]
admin = AdminClient({"bootstrap.servers": bootstrap})
parts = (ResourceType[kind], "*", ResourcePatternType.LITERAL, "User:tidegate", "*", AclOperation[operation], AclPermissionType.ALLOW)
done = admin.create_acls([AclBinding(*parts)]) if allowed == "true" else admin.delete_acls([AclBindingFilter(*parts)])
for future in done.values():
    future.result()
"#;
        let (kind, operation) = what.split_once(' ').expect("a kind and an operation");
        super::python(PROGRAM, &[&self.bootstrap(), kind, operation, &allowed.to_string()]).await;
    }

    /// A broker of one's own with, beside the plain listener, one that wants TLS and SASL PLAIN (user and password
    /// `tidegate`): [`Kafka::secure_bootstrap`], [`Kafka::root_certificate`].
    pub async fn own_secure() -> Kafka {
        Kafka::create(true, "").await
    }

    async fn create(secure: bool, settings: &str) -> Kafka {
        tokio::task::spawn_blocking(|| install("install-kafka.sh", &[])).await.expect("installed");
        let folder = Folder::new("kafka");
        let port = free_port();
        let dir = folder.path().display();
        let (controller, tls) = (port + 1, port + 2);
        let mut listeners = format!("PLAINTEXT://127.0.0.1:{port}");
        let mut protocols = "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT".to_owned();
        let mut more = String::new();
        if secure {
            certificate(folder.path());
            let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).expect("made by openssl");
            std::fs::write(folder.path().join("server.pem"), read("server.key") + &read("server.crt")).expect("pem");
            listeners += &format!(",SASL_SSL://127.0.0.1:{tls}");
            protocols += ",SASL_SSL:SASL_SSL";
            more = format!(
                "ssl.keystore.type=PEM\nssl.keystore.location={dir}/server.pem\nsasl.enabled.mechanisms=PLAIN\n\
                 listener.name.sasl_ssl.plain.sasl.jaas.config=\
                 org.apache.kafka.common.security.plain.PlainLoginModule required user_tidegate=\"tidegate\";\n"
            );
        }
        let properties = format!(
            "process.roles=broker,controller\nnode.id=1\ncontroller.quorum.voters=1@127.0.0.1:{controller}\n\
             controller.listener.names=CONTROLLER\nlisteners={listeners},CONTROLLER://127.0.0.1:{controller}\n\
             advertised.listeners={listeners}\nlistener.security.protocol.map={protocols}\nlog.dirs={dir}/data\n\
             num.partitions=1\noffsets.topic.num.partitions=1\noffsets.topic.replication.factor=1\n\
             transaction.state.log.num.partitions=1\ntransaction.state.log.replication.factor=1\n\
             transaction.state.log.min.isr=1\nshare.coordinator.state.topic.num.partitions=1\n\
             share.coordinator.state.topic.replication.factor=1\nshare.coordinator.state.topic.min.isr=1\n\
             group.initial.rebalance.delay.ms=0\nnum.network.threads=2\nnum.io.threads=4\nbackground.threads=2\n\
             num.recovery.threads.per.data.dir=2\nlog.cleaner.dedupe.buffer.size=4194304\n\
             log.cleaner.io.buffer.size=65536\nbroker.session.timeout.ms=3000\nbroker.heartbeat.interval.ms=500\n{more}{settings}"
        );
        let log4j = "status=error\nappender.o.type=Console\nappender.o.name=o\nappender.o.layout.type=PatternLayout\n\
             appender.o.layout.pattern=[%d] %p %m (%c)%n\nrootLogger.level=info\nrootLogger.appenderRef.o.ref=o\n";
        // What the storage tool would write; by hand it saves a JVM's start.
        let meta = "version=1\ncluster.id=AAAAAAAAAAAAAAAAAAAAAQ\nnode.id=1\ndirectory.id=AAAAAAAAAAAAAAAAAAAAZA\n";
        let write =
            |name: &str, text: &str| std::fs::write(folder.path().join(name), text).expect("a file of the broker");
        std::fs::create_dir(folder.path().join("data")).expect("data folder");
        write("server.properties", &properties);
        write("log4j2.properties", log4j);
        write("data/meta.properties", meta);
        let kafka = Kafka { port, secure, process: Mutex::new(None), folder };
        kafka.start().await;
        kafka
    }

    /// Starts it (again, on the same port and data) and waits until it serves.
    pub async fn start(&self) {
        let dir = self.folder.path();
        let log = dir.join("log");
        let _ = std::fs::remove_file(&log); // there is none at the first start
        let libs = cache_dir().join("kafka-4.3.1/libs/*");
        let process = Launch::new("kafka", "java")
            .args(JVM)
            .arg("-XX:+ExitOnOutOfMemoryError")
            .arg(format!("-Dlog4j2.configurationFile={}/log4j2.properties", dir.display()))
            .arg(format!("-Dkafka.logs.dir={}", dir.display()))
            .arg("-cp")
            .arg(libs)
            .arg("kafka.Kafka")
            .arg(dir.join("server.properties"))
            .dir(dir)
            .log(&log)
            .start();
        eventually(Duration::from_secs(150), "Kafka serves", async || {
            if let Some(code) = process.exited() {
                panic!("Kafka ended with {code}:\n{}", process.log_end(30));
            }
            process.log().contains("Kafka Server started")
        })
        .await;
        *self.process.lock().expect("not poisoned") = Some(process);
    }

    /// An orderly shutdown (SIGTERM).
    pub async fn stop(&self) {
        let process = self.process.lock().expect("not poisoned").take().expect("running");
        process.signal("TERM");
        process.wait(Duration::from_secs(60)).await;
    }

    /// `kill -9`. Back in about 4 s after [`Kafka::start`].
    pub async fn kill9(&self) {
        let process = self.process.lock().expect("not poisoned").take().expect("running");
        process.kill9().await;
    }

    /// Stops it where it stands, so that connections stay and nothing answers; [`Kafka::thaw`] lets it go on.
    pub fn freeze(&self) {
        self.process.lock().expect("not poisoned").as_ref().expect("running").signal("STOP");
    }

    pub fn thaw(&self) {
        self.process.lock().expect("not poisoned").as_ref().expect("running").signal("CONT");
    }

    /// `127.0.0.1:PORT`, for `bootstrap.servers`.
    pub fn bootstrap(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The listener that wants `security.protocol=SASL_SSL`, `sasl.mechanism=PLAIN`.
    pub fn secure_bootstrap(&self) -> String {
        assert!(self.secure, "made with Kafka::own_secure");
        format!("127.0.0.1:{}", self.port + 2)
    }

    /// librdkafka's settings for that listener.
    pub fn secure_settings(&self) -> [(String, String); 5] {
        let root = self.root_certificate().display().to_string();
        [
            ("security.protocol", "SASL_SSL"),
            ("sasl.mechanism", "PLAIN"),
            ("sasl.username", "tidegate"),
            ("sasl.password", "tidegate"),
            ("ssl.ca.location", &root),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
    }

    /// For `ssl.ca.location`.
    pub fn root_certificate(&self) -> std::path::PathBuf {
        self.folder.path().join("root.crt")
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}

#[cfg(feature = "kafka")]
mod tests {
    use super::*;
    use rdkafka::ClientConfig;
    use rdkafka::consumer::{BaseConsumer, Consumer};
    use rdkafka::producer::{FutureProducer, FutureRecord};

    fn high_watermark(config: &ClientConfig) -> Result<i64, rdkafka::error::KafkaError> {
        let consumer: BaseConsumer = config.clone().set("group.id", "g").create()?;
        Ok(consumer.fetch_watermarks("kept", 0, Duration::from_secs(5))?.1)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_killed_broker_comes_back_with_its_records_and_takes_tls_and_a_password() {
        let kafka = Kafka::own_secure().await;
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", kafka.secure_bootstrap())
            .set("security.protocol", "SASL_SSL")
            .set("sasl.mechanism", "PLAIN")
            .set("sasl.username", "tidegate")
            .set("sasl.password", "tidegate")
            .set("ssl.ca.location", kafka.root_certificate().to_str().unwrap());
        let producer: FutureProducer = config.create().unwrap();
        let record = FutureRecord::to("kept").key("k").payload("v");
        producer.send(record, Duration::from_secs(20)).await.unwrap();
        kafka.kill9().await;
        kafka.start().await;
        eventually(Duration::from_secs(30), "the record is there", async || {
            high_watermark(&config).is_ok_and(|high| high == 1)
        })
        .await;
        config.set("sasl.password", "wrong");
        assert!(high_watermark(&config).is_err());
    }
}
