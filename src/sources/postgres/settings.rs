//! Settings of a capture, by Debezium's names.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use regex::Regex;
use tokio_postgres::config::ChannelBinding as Asked;

use crate::avro::{ColumnLists, EncodingSettings, SESSION_SETTINGS};
use crate::config::{ByteSize, ConfigError, Secret, Section, Spanned};
use crate::datastore::{DatastoreSettings, SslMode};
use crate::event::Operation;
use crate::log::TopicSpec;
use crate::pipeline::Fault;
use crate::postgres::publication::Autocreate;
use crate::postgres::table_filter::pattern;
use crate::postgres::{Address, ChannelBinding, TableFilter, Tls};

/// `snapshot.mode`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotMode {
    /// Once, where the log has no position.
    Initial,
    /// Once, and no streaming after it.
    InitialOnly,
    /// Stream from where the slot stands or is made.
    NoData,
    /// At every start.
    Always,
    /// As initial, and again when changes were lost.
    WhenNeeded,
}

/// `on.incompatible`: the registry refuses a table's new schema.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnIncompatible {
    /// The table is left out until it is read anew, the others go on.
    Quarantine,
    /// The capture stops and says so; its slot keeps what comes.
    Stop,
    /// The schema goes under another subject (`TOPIC-value-v2`), in the same topic.
    NewSubject,
}

#[derive(Clone, Debug)]
pub struct CaptureSettings {
    /// `None`: the worker's datastore.
    pub database: Option<DatastoreSettings>,
    pub prefix: String,
    pub slot: String,
    /// `slot.failover`
    pub failover: bool,
    pub publication: String,
    pub autocreate: Autocreate,
    pub via_root: bool,
    pub tables: TableFilter,
    pub snapshot: SnapshotMode,
    pub incompatible: OnIncompatible,
    /// Operations that make no event.
    pub skipped: BTreeSet<char>,
    /// Logical messages by prefix: included (all, where empty), excluded.
    pub messages_included: Vec<Regex>,
    pub messages_excluded: Vec<Regex>,
    pub encoding: EncodingSettings,
    pub partitions: i32,
    pub replication_factor: Option<i32>,
    pub topic_settings: BTreeMap<String, String>,
    /// A batch is handed on when it has grown to this.
    pub batch_bytes: usize,
    /// How often a heartbeat is written.
    pub heartbeat: Option<Duration>,
    /// How often an idle slot is moved on.
    pub idle_advance: Duration,
    /// How long the slot's creation may wait for running transactions.
    pub slot_creation: Duration,
}

/// Settings of each session beside those of its text: a role's or database's own would cut a snapshot short, or, where
/// policies hide rows from the role, have it read less than all rows without a word (with `off` that is an error).
const WHOLE: &[(&str, &str)] = &[
    ("row_security", "off"),
    ("statement_timeout", "0"),
    ("lock_timeout", "0"),
    ("idle_in_transaction_session_timeout", "0"),
    ("idle_session_timeout", "0"),
];

fn patterns(section: &mut Section, name: &str) -> Result<Vec<Regex>, ConfigError> {
    let list: Vec<Spanned<String>> = section.or(name, Vec::new())?;
    list.iter()
        .map(|text| {
            pattern(text).map_err(|error| {
                ConfigError::new(&text.place, format!("{name}: '{}' is not a regular expression: {error}", text.value))
                    .hint(r"an entry matches the whole name, as in public\.orders or public\..*")
            })
        })
        .collect()
}

impl CaptureSettings {
    /// What can be had without a file: for tests and for defaults.
    pub fn new(prefix: &str) -> Self {
        let name: String =
            prefix.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' }).collect();
        CaptureSettings {
            database: None,
            prefix: prefix.to_owned(),
            slot: format!("tidegate_{name}"),
            failover: false,
            publication: format!("tidegate_{name}"),
            autocreate: Autocreate::Filtered,
            via_root: false,
            tables: TableFilter::default(),
            snapshot: SnapshotMode::Initial,
            incompatible: OnIncompatible::Quarantine,
            skipped: BTreeSet::from(['t']),
            messages_included: Vec::new(),
            messages_excluded: Vec::new(),
            encoding: EncodingSettings::new(prefix, ""),
            partitions: 1,
            replication_factor: None,
            topic_settings: BTreeMap::new(),
            batch_bytes: 1 << 20,
            heartbeat: None,
            idle_advance: Duration::from_secs(10),
            slot_creation: Duration::from_secs(600),
        }
    }

    pub fn read(section: &mut Section) -> Result<Self, ConfigError> {
        let prefix: Spanned<String> = section.require("topic.prefix")?;
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if prefix.is_empty() || !prefix.chars().all(plain) {
            return Err(ConfigError::new(
                &prefix.place,
                format!("topic.prefix: '{}' can't begin a topic", prefix.value),
            )
            .hint("letters, digits, '.', '_' and '-'"));
        }
        let mut settings = CaptureSettings::new(&prefix);
        settings.database = database(section)?;
        if let Some(slot) = section.take::<Spanned<String>>("slot.name")? {
            let right = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
            if slot.is_empty() || slot.len() > 63 || !slot.chars().all(right) {
                return Err(ConfigError::new(&slot.place, format!("slot.name: '{}' can't name a slot", slot.value))
                    .hint("up to 63 lower-case letters, digits and '_'"));
            }
            settings.slot = slot.value;
        }
        settings.failover = section.or("slot.failover", false)?;
        settings.publication = section.or("publication.name", settings.publication)?;
        settings.autocreate = section.or("publication.autocreate.mode", settings.autocreate)?;
        settings.via_root = section.or("publish.via.partition.root", false)?;
        settings.tables = TableFilter {
            schema_include: patterns(section, "schema.include.list")?,
            schema_exclude: patterns(section, "schema.exclude.list")?,
            table_include: patterns(section, "table.include.list")?,
            table_exclude: patterns(section, "table.exclude.list")?,
        };
        settings.encoding.columns = ColumnLists {
            include: patterns(section, "column.include.list")?,
            exclude: patterns(section, "column.exclude.list")?,
        };
        if !settings.encoding.columns.include.is_empty() && !settings.encoding.columns.exclude.is_empty() {
            return Err(section
                .error("column.exclude.list", "column.include.list and column.exclude.list are both given")
                .hint("one of them decides"));
        }
        super::debezium::refuse(section)?;
        settings.snapshot = section.or("snapshot.mode", settings.snapshot)?;
        settings.incompatible = section.or("on.incompatible", settings.incompatible)?;
        if let Some(list) = section.take::<Spanned<Vec<String>>>("skipped.operations")? {
            settings.skipped.clear();
            for entry in &list.value {
                match (entry.as_str(), Operation::from_letter(entry)) {
                    ("none", _) => {}
                    (_, Some(operation)) => settings.skipped.extend(operation.letter().chars()),
                    _ => {
                        let message = format!("skipped.operations: '{entry}' is no operation");
                        return Err(ConfigError::new(&list.place, message).hint("any of c, u, d, t, or none"));
                    }
                }
            }
        }
        settings.messages_included = patterns(section, "message.prefix.include.list")?;
        settings.messages_excluded = patterns(section, "message.prefix.exclude.list")?;
        let encoding = &mut settings.encoding;
        encoding.decimal = mode(section, "decimal.handling.mode", encoding.decimal)?;
        encoding.time = mode(section, "time.precision.mode", encoding.time)?;
        encoding.binary = mode(section, "binary.handling.mode", encoding.binary)?;
        encoding.hstore = mode(section, "hstore.handling.mode", encoding.hstore)?;
        encoding.interval = mode(section, "interval.handling.mode", encoding.interval)?;
        encoding.money_fraction_digits = section.or("money.fraction.digits", encoding.money_fraction_digits)?;
        encoding.tombstones_on_delete = section.or("tombstones.on.delete", encoding.tombstones_on_delete)?;
        let placeholder = encoding.unavailable_value.clone();
        encoding.unavailable_value = section.or("unavailable.value.placeholder", placeholder)?;
        for (name, value) in section.entries("topic.creation.default")? {
            let number = || {
                value.parse::<i32>().ok().filter(|number| *number > 0).ok_or_else(|| {
                    let message = format!("topic.creation.default.{name}: '{}' is not a number from 1", value.value);
                    ConfigError::new(&value.place, message)
                })
            };
            match name.as_str() {
                "partitions" => settings.partitions = number()?,
                "replication.factor" if value.value == "-1" => settings.replication_factor = None,
                "replication.factor" => settings.replication_factor = Some(number()?),
                _ => {
                    settings.topic_settings.insert(name, value.value);
                }
            }
        }
        let batch: Spanned<ByteSize> = match section.take("batch.bytes")? {
            None => return settings.read_times(section),
            Some(batch) => batch,
        };
        if !(1 << 10..=256 << 20).contains(&batch.value.0) {
            return Err(ConfigError::new(&batch.place, "batch.bytes: between 1kb and 256mb"));
        }
        settings.batch_bytes = batch.value.0 as usize;
        settings.read_times(section)
    }

    fn read_times(mut self, section: &mut Section) -> Result<Self, ConfigError> {
        let heartbeat: Duration = section.or("heartbeat.interval.ms", Duration::ZERO)?;
        self.heartbeat = Some(heartbeat).filter(|every| !every.is_zero());
        self.idle_advance = section.or("idle.advance.interval", self.idle_advance)?;
        self.slot_creation = section.or("slot.creation.timeout", self.slot_creation)?;
        Ok(self)
    }

    /// Where the events come from; `worker` is the datastore of the worker.
    pub fn address(&self, worker: &DatastoreSettings) -> Result<Address, Fault> {
        let from = self.database.as_ref().unwrap_or(worker);
        if from.hosts() > 1 {
            return Err(Fault::stop(format!(
                "the datastore's url names {} hosts: a slot is on one of them. hint: give the capture the primary's \
                 address, or one name that follows it ('database.hostname')",
                from.hosts()
            )));
        }
        let tls = match from.tls_config().map_err(|error| Fault::stop(error.to_string()))? {
            None => Tls::Disable,
            Some(config) if from.ssl_mode == SslMode::Prefer => Tls::Prefer(Arc::new(config)),
            Some(config) => Tls::Require(Arc::new(config)),
        };
        Ok(Address {
            host: from.host(),
            port: from.port(),
            user: from.user().to_owned(),
            password: from.password().map(<[u8]>::to_vec),
            dbname: from.dbname().to_owned(),
            tls,
            channel_binding: match from.channel_binding() {
                Asked::Disable => ChannelBinding::Disable,
                Asked::Require => ChannelBinding::Require,
                _ => ChannelBinding::Prefer,
            },
            settings: SESSION_SETTINGS.iter().chain(WHOLE).copied().collect(),
        })
    }

    /// How a topic of this capture is to be made.
    pub fn topic(&self, name: &str) -> TopicSpec {
        TopicSpec {
            name: name.to_owned(),
            partitions: self.partitions,
            replication_factor: self.replication_factor,
            settings: self.topic_settings.clone(),
        }
    }

    /// What decides how changes are counted within a transaction (CORRECTNESS 6).
    pub fn fingerprint(&self) -> u64 {
        let counted = format!("{}\n{}\n{}\npgoutput 1, messages", self.slot, self.publication, self.via_root);
        u64::from(crc32fast::hash(counted.as_bytes()))
    }

    /// What decides whether a table can be written: all settings, and the version of this program.
    pub fn attempt(&self) -> u32 {
        crc32fast::hash(format!("{} {self:?}", env!("CARGO_PKG_VERSION")).as_bytes())
    }

    pub fn wants_message(&self, prefix: &str) -> bool {
        let any = |list: &[Regex]| list.iter().any(|pattern| pattern.is_match(prefix));
        !prefix.starts_with("tidegate.")
            && !self.skipped.contains(&'m')
            && (self.messages_included.is_empty() || any(&self.messages_included))
            && !any(&self.messages_excluded)
    }
}

/// One of Debezium's modes, by name.
fn mode<T>(section: &mut Section, name: &str, default: T) -> Result<T, ConfigError>
where
    T: std::str::FromStr<Err = String>,
{
    match section.take::<Spanned<String>>(name)? {
        None => Ok(default),
        Some(text) => text.parse().map_err(|error| ConfigError::new(&text.place, format!("{name}: {error}"))),
    }
}

/// The `database.*` settings; `None` without `database.hostname`.
fn database(section: &mut Section) -> Result<Option<DatastoreSettings>, ConfigError> {
    let host: Option<Spanned<String>> = section.take("database.hostname")?;
    let Some(host) = host else { return Ok(None) };
    let port = section.or("database.port", 5432u16)?;
    let user: String = section.require("database.user")?;
    let password: Option<Secret> = section.take("database.password")?;
    let dbname: String = section.require("database.dbname")?;
    let mode: Option<Spanned<String>> = section.take("database.sslmode")?;
    let mode = match mode {
        None => SslMode::Prefer,
        Some(text) => SslMode::parse(&text).ok_or_else(|| {
            ConfigError::new(&text.place, format!("database.sslmode: '{}' is not known", text.value))
                .hint("one of disable, prefer, require, verify-ca, verify-full")
        })?,
    };
    let mut settings = DatastoreSettings::from_parts(&host, port, &dbname, &user, password.as_ref(), mode);
    settings.ssl_root_cert = section.take("database.sslrootcert")?;
    Ok(Some(settings))
}

crate::choices!(SnapshotMode {
    "initial" => SnapshotMode::Initial,
    "initial_only" => SnapshotMode::InitialOnly,
    "no_data" => SnapshotMode::NoData,
    "always" => SnapshotMode::Always,
    "when_needed" => SnapshotMode::WhenNeeded,
});

crate::choices!(OnIncompatible {
    "quarantine" => OnIncompatible::Quarantine,
    "stop" => OnIncompatible::Stop,
    "new-subject" => OnIncompatible::NewSubject,
});

crate::choices!(Autocreate {
    "all_tables" => Autocreate::AllTables,
    "filtered" => Autocreate::Filtered,
    "disabled" => Autocreate::Disabled,
});
