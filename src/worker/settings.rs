//! The worker's own file, `config/tidegate.yaml`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::config::{self, ByteSize, ConfigError, NodeKind, Secret, Section, Spanned};
use crate::datastore::DatastoreSettings;
use crate::log::EmbeddedSettings;
#[cfg(feature = "kafka")]
use crate::log::KafkaSettings;
use crate::registry::{RegistryAuth, RegistryClient};
use crate::systems::{System, SystemSettings};

/// Where logs and state live when nothing else is said.
const DATA: &str = "/var/lib/tidegate";

/// What `config/tidegate.yaml` says.
#[derive(Clone)]
pub struct WorkerSettings {
    /// Where this was read, once, at the start; and a checksum of its text then.
    pub file: PathBuf,
    pub checksum: u32,
    pub datastore: DatastoreSettings,
    pub log: LogSettings,
    pub registry: RegistrySettings,
    pub systems: BTreeMap<String, Arc<System>>,
    /// Folder of the connector files.
    pub connectors: PathBuf,
    pub rest: RestSettings,
    /// Folder of what the worker keeps for itself: pauses, the built-in registry, spool files. The embedded log's
    /// own when nothing else is said.
    pub state: PathBuf,
    pub logging: LoggingSettings,
    /// How long connectors may drain at shutdown, and when one is restarted.
    pub drain: Duration,
}

#[derive(Clone, Debug)]
pub enum LogSettings {
    Embedded(EmbeddedSettings),
    #[cfg(feature = "kafka")]
    Kafka(KafkaSettings),
}

#[derive(Clone)]
pub enum RegistrySettings {
    Builtin,
    Url { url: String, auth: RegistryAuth },
}

#[derive(Clone)]
pub struct RestSettings {
    pub listen: SocketAddr,
    /// Asked for as a bearer token (or as the password of basic auth) by everything but `/health`.
    pub token: Option<Secret>,
}

#[derive(Clone, Debug, Default)]
pub struct LoggingSettings {
    pub format: Option<String>,
    pub level: Option<String>,
}

impl WorkerSettings {
    pub fn read_file(path: &Path) -> Result<Self, ConfigError> {
        let checksum = checksum(path);
        let mut settings = Self::read(Section::new(config::parse_file(path)?, "the worker's settings")?)?;
        (settings.file, settings.checksum) = (path.to_owned(), checksum);
        Ok(settings)
    }

    /// The file has another text than when it was read. One that can't be read at the moment has not.
    pub fn has_changed(&self) -> bool {
        ![0, self.checksum].contains(&checksum(&self.file))
    }

    fn read(mut section: Section) -> Result<Self, ConfigError> {
        let datastore = match section.section("datastore")? {
            Some(datastore) => read_datastore(datastore)?,
            None => {
                return Err(section
                    .missing("datastore")
                    .hint("datastore: { url: \"postgres://role@host:5432/database\" }"));
            }
        };
        let log = match section.section("log")? {
            Some(log) => read_log(log)?,
            None => LogSettings::Embedded(EmbeddedSettings::new(DATA)),
        };
        let registry = read_registry(&mut section)?;
        let beside_log = match &log {
            LogSettings::Embedded(log) => log.path.clone(),
            #[cfg(feature = "kafka")]
            LogSettings::Kafka(_) => PathBuf::from(DATA),
        };
        let state = section.or("state", beside_log)?;
        let connectors = section.or("connectors", section.place().beside(Path::new("../connectors")))?;
        let rest = read_rest(&mut section)?;
        let logging = LoggingSettings {
            format: section
                .take::<Spanned<String>>("logging.format")?
                .map(|text| one_of(text, &["human", "json"]))
                .transpose()?,
            level: section.take::<Spanned<String>>("logging.level")?.map(log_level).transpose()?,
        };
        let drain = section.or("shutdown.deadline", Duration::from_secs(20))?;
        let systems = read_systems(&mut section)?;
        section.finish()?;
        let (file, checksum) = (PathBuf::new(), 0);
        Ok(WorkerSettings {
            file,
            checksum,
            datastore,
            log,
            registry,
            systems,
            connectors,
            rest,
            state,
            logging,
            drain,
        })
    }
}

/// 0 where the file can't be read.
fn checksum(path: &Path) -> u32 {
    std::fs::read(path).map_or(0, |text| crc32fast::hash(&text))
}

fn one_of(text: Spanned<String>, names: &[&str]) -> Result<String, ConfigError> {
    if names.contains(&text.as_str()) {
        return Ok(text.value);
    }
    let error = ConfigError::new(&text.place, format!("`{}` is not known here", text.value));
    Err(error.hint(format!("it is one of: {}", names.join(", "))))
}

/// Whether log lines can be chosen by this: a level, then those of parts (`info,tidegate::sources=debug`). A word that
/// is no level would be taken for a part's name, and the worker would be silent.
pub fn is_log_level(text: &str) -> bool {
    let is_level = |word: &str| {
        ["off", "error", "warn", "info", "debug", "trace"].iter().any(|level| word.eq_ignore_ascii_case(level))
    };
    let mut directives = text.split(',').map(str::trim);
    directives.next().is_some_and(is_level)
        && directives.all(|part| part.split_once('=').is_some_and(|(name, level)| !name.is_empty() && is_level(level)))
}

fn log_level(text: Spanned<String>) -> Result<String, ConfigError> {
    if is_log_level(&text) {
        return Ok(text.value);
    }
    let error = ConfigError::new(&text.place, format!("`{}` is no log level", text.value));
    Err(error.hint("error, warn, info, debug or trace; a part's own after commas: info,tidegate::sources=debug"))
}

fn read_datastore(mut section: Section) -> Result<DatastoreSettings, ConfigError> {
    let settings = DatastoreSettings::read(&mut section)?;
    section.finish()?;
    Ok(settings)
}

fn read_log(mut section: Section) -> Result<LogSettings, ConfigError> {
    let kind = match section.take::<Spanned<String>>("type")? {
        Some(kind) => one_of(kind, &["embedded", "kafka"])?,
        None => "embedded".to_owned(),
    };
    if kind == "kafka" {
        return read_kafka(section);
    }
    let mut settings = EmbeddedSettings::new(section.or("path", PathBuf::from(DATA))?);
    settings.retention = section.or("retention", settings.retention)?;
    settings.retention_bytes = section.take::<ByteSize>("retention.bytes")?.map(|size| size.0);
    settings.size_limit = section.or("size.limit", ByteSize(settings.size_limit))?.0;
    section.finish()?;
    Ok(LogSettings::Embedded(settings))
}

#[cfg(feature = "kafka")]
fn read_kafka(mut section: Section) -> Result<LogSettings, ConfigError> {
    let servers: Vec<String> = match section.take("bootstrap.servers")? {
        Some(servers) => servers,
        None => {
            return Err(section.missing("bootstrap.servers").hint(
                "log: { type: kafka, bootstrap.servers: \"host:9092\" }; any librdkafka setting may stand beside it",
            ));
        }
    };
    let mut settings = KafkaSettings::new(&servers.join(","));
    settings.positions_topic = section.or("positions.topic", settings.positions_topic)?;
    settings.positions_replication_factor = section.take("positions.replication.factor")?;
    settings.librdkafka = section.entries("")?.into_iter().map(|(name, value)| (name, value.value)).collect();
    Ok(LogSettings::Kafka(settings))
}

#[cfg(not(feature = "kafka"))]
fn read_kafka(section: Section) -> Result<LogSettings, ConfigError> {
    Err(section
        .error("type", "this tidegate was built without Kafka")
        .hint("build it with the feature `kafka`, or take `type: embedded`"))
}

fn read_registry(section: &mut Section) -> Result<RegistrySettings, ConfigError> {
    let name = "schema.registry";
    let Some(node) = section.node(name)? else { return Ok(RegistrySettings::Builtin) };
    let (url, auth) = if matches!(node.kind, NodeKind::Map(_)) {
        let mut inside = Section::new(node, name)?;
        let url: Spanned<String> = inside.require("url")?;
        let username: Option<String> = inside.take("username")?;
        let password: Option<Secret> = inside.take("password")?;
        let token: Option<Secret> = inside.take("token")?;
        let auth = match (username, password, token) {
            (None, None, None) => RegistryAuth::None,
            (Some(username), Some(password), None) => RegistryAuth::Basic { username, password },
            (None, None, Some(token)) => RegistryAuth::Bearer(token),
            _ => {
                return Err(ConfigError::new(
                    &url.place,
                    "half of the registry's credentials are missing, or too many",
                )
                .hint("give `username` and `password`, or `token`, or none of them"));
            }
        };
        inside.finish()?;
        (url, auth)
    } else {
        (node.text(name)?, RegistryAuth::None)
    };
    if url.as_str() == "builtin" {
        return Ok(RegistrySettings::Builtin);
    }
    RegistryClient::new(&url, auth.clone()).map_err(|error| {
        ConfigError::new(&url.place, error.to_string()).hint("`builtin`, or a URL such as `http://localhost:8081`")
    })?;
    Ok(RegistrySettings::Url { url: url.value, auth })
}

fn read_rest(section: &mut Section) -> Result<RestSettings, ConfigError> {
    let listen: Spanned<String> = match section.take("rest.listen")? {
        Some(listen) => listen,
        None => Spanned::new("127.0.0.1:8080".to_owned(), section.place().clone()),
    };
    let token: Option<Secret> = section.take("rest.token")?;
    let open = section.or("rest.allow.anyone", false)?;
    let listen_at: SocketAddr = listen.parse().map_err(|_| {
        ConfigError::new(&listen.place, format!("`{}` is no address to listen at", *listen))
            .hint("an IP address and a port: 127.0.0.1:8080")
    })?;
    if !listen_at.ip().is_loopback() && token.is_none() && !open {
        return Err(ConfigError::new(&listen.place, "whoever reaches this address could pause connectors and read data")
            .hint("set rest.token (`token: \"${file:/run/secrets/rest}\"`), or `allow.anyone: true` where the network keeps others out"));
    }
    Ok(RestSettings { listen: listen_at, token })
}

fn read_systems(section: &mut Section) -> Result<BTreeMap<String, Arc<System>>, ConfigError> {
    let mut systems = BTreeMap::new();
    let Some(node) = section.node("systems")? else { return Ok(systems) };
    let NodeKind::Map(entries) = node.kind else {
        return Err(ConfigError::new(&node.place, "`systems` is a map of systems by name")
            .hint("systems: { erp: { base_url: \"https://erp.example/api\" } }"));
    };
    let mut errors = Vec::new();
    for (name, node) in entries {
        let read = Section::new(node, &format!("system `{}`", name.value))
            .and_then(|section| SystemSettings::read(&name.value, section))
            .and_then(System::new);
        match read {
            Ok(system) => {
                systems.insert(name.value, system);
            }
            Err(error) => errors.push(error),
        }
    }
    ConfigError::all(errors)?;
    Ok(systems)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_that_is_no_level_is_not_taken_for_the_name_of_a_part() {
        for good in ["info", "WARN", "off", "info,tidegate::sources=debug", "warn, rdkafka=error"] {
            assert!(is_log_level(good), "{good}");
        }
        for wrong in ["", "inof", "tidegate=debug", "info,debug", "info,tidegate", "info,=debug", "info,a=loud"] {
            assert!(!is_log_level(wrong), "{wrong}");
        }
    }
}
