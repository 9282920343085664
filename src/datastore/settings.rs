//! Where the datastore is, as whom, and how it is trusted. Capture reads the same settings for its own connections.

use std::path::PathBuf;
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use tokio_postgres::Config;
use tokio_postgres::config::{ChannelBinding, Host};

use super::{DatastoreError, tls};
use crate::config::{ConfigError, Secret, Section, Spanned};

/// Address, role and trust of a datastore. `Debug` shows no secret.
#[derive(Clone)]
pub struct DatastoreSettings {
    config: Config,
    pub ssl_mode: SslMode,
    /// PEM file of the authorities to trust; without it, those of the machine.
    pub ssl_root_cert: Option<PathBuf>,
    /// Connections of the pool, at the most.
    pub pool_size: usize,
}

/// libpq's `sslmode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SslMode {
    Disable,
    /// TLS where the server has it; nothing is verified.
    Prefer,
    /// TLS or nothing; verified only where a root certificate is given, as libpq has it.
    Require,
    /// The certificate must come from a trusted authority.
    VerifyCa,
    /// And must be for the host that was asked for.
    VerifyFull,
}

crate::choices!(SslMode {
    "disable" => SslMode::Disable,
    "prefer" => SslMode::Prefer,
    "require" => SslMode::Require,
    "verify-ca" => SslMode::VerifyCa,
    "verify-full" => SslMode::VerifyFull,
});

impl SslMode {
    pub fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "disable" => SslMode::Disable,
            "prefer" | "allow" => SslMode::Prefer,
            "require" => SslMode::Require,
            "verify-ca" => SslMode::VerifyCa,
            "verify-full" => SslMode::VerifyFull,
            _ => return None,
        })
    }
}

impl std::fmt::Debug for DatastoreSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DatastoreSettings").field("place", &self.place()).field("ssl_mode", &self.ssl_mode).finish()
    }
}

impl DatastoreSettings {
    /// Reads `url`, `password`, `sslmode`, `sslrootcert`, `pool_size`; the caller finishes the section.
    pub fn read(section: &mut Section) -> Result<Self, ConfigError> {
        let url: Spanned<String> = section.require("url")?;
        let mut settings =
            DatastoreSettings::from_url(&url).map_err(|error| section.error("url", error.message.clone()))?;
        settings.ssl_root_cert = settings.ssl_root_cert.map(|path| url.place.beside(&path));
        if let Some(password) = section.take::<Secret>("password")? {
            settings.set_password(&password);
        }
        if let Some(mode) = section.take("sslmode")? {
            settings.ssl_mode = mode;
        }
        if let Some(path) = section.take("sslrootcert")? {
            settings.ssl_root_cert = Some(path);
        }
        settings.pool_size = section.or("pool_size", settings.pool_size)?;
        if settings.pool_size < 2 {
            return Err(section.error("pool_size", "the pool needs at least 2 connections"));
        }
        Ok(settings)
    }

    /// From `postgres://role@host:port/database?sslmode=…&sslrootcert=…`, or `key=value` pairs.
    pub fn from_url(url: &str) -> Result<Self, DatastoreError> {
        let (plain, ssl_mode, ssl_root_cert) = take_ssl(url)?;
        // The parser's own error repeats no part of the text but the name of a parameter.
        let config: Config = plain.parse().map_err(|error: tokio_postgres::Error| {
            let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            DatastoreError::setup(format!(
                "the datastore's url can't be read: {cause}; hint: it looks like postgres://role@host:5432/database"
            ))
        })?;
        let mut settings = DatastoreSettings { config, ssl_mode, ssl_root_cert, pool_size: 16 };
        settings.fill_defaults();
        Ok(settings)
    }

    /// From the separate `database.*` settings that users of Debezium know.
    pub fn from_parts(
        host: &str,
        port: u16,
        dbname: &str,
        user: &str,
        password: Option<&SecretString>,
        ssl_mode: SslMode,
    ) -> Self {
        let mut config = Config::new();
        config.host(host).port(port).dbname(dbname).user(user);
        let mut settings = DatastoreSettings { config, ssl_mode, ssl_root_cert: None, pool_size: 16 };
        if let Some(password) = password {
            settings.set_password(password);
        }
        settings.fill_defaults();
        settings
    }

    pub fn set_password(&mut self, password: &SecretString) {
        self.config.password(password.expose_secret());
    }

    fn fill_defaults(&mut self) {
        let config = &mut self.config;
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(Duration::from_secs(10));
        }
        if config.get_tcp_user_timeout().is_none() {
            config.tcp_user_timeout(Duration::from_secs(30));
        }
        config.keepalives(true);
        config.keepalives_idle(Duration::from_secs(15));
        config.keepalives_interval(Duration::from_secs(5));
        config.keepalives_retries(3);
        if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
            config.host("127.0.0.1");
        }
    }

    /// For SQL connections. What `ssl_mode` asks beyond encryption is in [`DatastoreSettings::tls_config`].
    pub fn config(&self) -> Config {
        let mut config = self.config.clone();
        config.ssl_mode(match self.ssl_mode {
            SslMode::Disable => tokio_postgres::config::SslMode::Disable,
            SslMode::Prefer => tokio_postgres::config::SslMode::Prefer,
            _ => tokio_postgres::config::SslMode::Require,
        });
        config
    }

    /// The TLS client settings of `ssl_mode`; `None` for `disable`.
    pub fn tls_config(&self) -> Result<Option<rustls::ClientConfig>, DatastoreError> {
        tls::client_config(self)
    }

    /// libpq's `channel_binding`.
    pub fn channel_binding(&self) -> ChannelBinding {
        self.config.get_channel_binding()
    }

    /// How many servers the settings name.
    pub fn hosts(&self) -> usize {
        self.config.get_hosts().len().max(self.config.get_hostaddrs().len())
    }

    /// The first address: a host name or IP, or the folder of a Unix socket.
    pub fn host(&self) -> String {
        match self.config.get_hosts().first() {
            Some(Host::Tcp(name)) => name.clone(),
            #[cfg(unix)]
            Some(Host::Unix(path)) => path.display().to_string(),
            None => self.config.get_hostaddrs().first().map(ToString::to_string).unwrap_or_default(),
        }
    }

    pub fn port(&self) -> u16 {
        self.config.get_ports().first().copied().unwrap_or(5432)
    }

    pub fn user(&self) -> &str {
        self.config.get_user().unwrap_or("postgres")
    }

    pub fn dbname(&self) -> &str {
        self.config.get_dbname().unwrap_or_else(|| self.user())
    }

    pub fn password(&self) -> Option<&[u8]> {
        self.config.get_password()
    }

    /// `role@host:port/database`, without secrets.
    pub fn place(&self) -> String {
        format!("{}@{}:{}/{}", self.user(), self.host(), self.port(), self.dbname())
    }
}

/// Takes `sslmode` and `sslrootcert` out of the text: tokio-postgres knows only some of libpq's.
fn take_ssl(url: &str) -> Result<(String, SslMode, Option<PathBuf>), DatastoreError> {
    let mut mode = SslMode::Prefer;
    let mut root_cert = None;
    let mut take = |name: &str, value: &str| -> Result<bool, DatastoreError> {
        match name {
            "sslmode" => {
                mode = SslMode::parse(value).ok_or_else(|| {
                    DatastoreError::setup(format!(
                        "sslmode '{value}' is not known; it is one of disable, prefer, require, verify-ca, verify-full"
                    ))
                })?;
            }
            "sslrootcert" => {
                root_cert =
                    Some(PathBuf::from(percent_encoding::percent_decode_str(value).decode_utf8_lossy().into_owned()));
            }
            _ => return Ok(false),
        }
        Ok(true)
    };
    let plain = if url.starts_with("postgres://") || url.starts_with("postgresql://") {
        match url.split_once('?') {
            None => url.to_owned(),
            Some((base, query)) => {
                let mut kept = Vec::new();
                for pair in query.split('&').filter(|pair| !pair.is_empty()) {
                    let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
                    if !take(name, value)? {
                        kept.push(pair);
                    }
                }
                if kept.is_empty() { base.to_owned() } else { format!("{base}?{}", kept.join("&")) }
            }
        }
    } else {
        let mut kept = Vec::new();
        for pair in url.split_whitespace() {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            if !take(name, value)? {
                kept.push(pair);
            }
        }
        kept.join(" ")
    };
    Ok((plain, mode, root_cert))
}

/// One connection outside the pool, with the task that drives it; the task ends when the client is dropped.
pub async fn connect(
    settings: &DatastoreSettings,
) -> Result<(tokio_postgres::Client, tokio::task::JoinHandle<()>), DatastoreError> {
    let place = settings.place();
    let connecting = settings.config();
    let wait = Duration::from_secs(20);
    let (client, connection) = tokio::time::timeout(wait, connecting.connect(tls::connector(settings)?))
        .await
        .map_err(|_| DatastoreError::unavailable(format!("datastore {place}: no answer within {} s", wait.as_secs())))?
        .map_err(|error| DatastoreError::from(error).context(format!("datastore {place}")))?;
    let task = tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a datastore connection ended");
        }
    });
    Ok((client, task))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relative_root_certificate_starts_at_the_folder_of_the_file_that_names_it() {
        for (text, path) in [
            ("url: postgres://u@h/d\nsslrootcert: certs/ca.pem", "/etc/tidegate/certs/ca.pem"),
            ("url: postgres://u@h/d?sslrootcert=../ca.pem", "/etc/ca.pem"),
            ("url: host=h user=u sslrootcert=ca.pem", "/etc/tidegate/ca.pem"),
            ("url: postgres://u@h/d\nsslrootcert: /ca.pem", "/ca.pem"),
        ] {
            let node = crate::config::parse_text(text, "/etc/tidegate/tidegate.yaml").unwrap();
            let settings = DatastoreSettings::read(&mut Section::new(node, "datastore").unwrap()).unwrap();
            assert_eq!(settings.ssl_root_cert.as_deref(), Some(std::path::Path::new(path)), "{text}");
        }
    }

    #[test]
    fn ssl_settings_are_read_from_either_spelling_and_the_rest_is_left() {
        let url = "postgres://u@h:5433/d?sslmode=verify-full&connect_timeout=3&sslrootcert=%2Fetc%2Fca.pem";
        let settings = DatastoreSettings::from_url(url).unwrap();
        assert_eq!(settings.ssl_mode, SslMode::VerifyFull);
        assert_eq!(settings.ssl_root_cert.as_deref(), Some(std::path::Path::new("/etc/ca.pem")));
        assert_eq!(settings.config.get_connect_timeout(), Some(&Duration::from_secs(3)));
        assert_eq!(settings.place(), "u@h:5433/d");
        let settings = DatastoreSettings::from_url("host=/tmp/s port=1 user=a dbname=b sslmode=disable").unwrap();
        assert_eq!((settings.ssl_mode, settings.place().as_str()), (SslMode::Disable, "a@/tmp/s:1/b"));
    }

    #[test]
    fn a_wrong_url_is_refused_without_showing_its_password() {
        let error = DatastoreSettings::from_url("postgres://u:hidden@h/d?sslmode=perhaps").unwrap_err();
        assert!(error.message.contains("verify-full") && !error.message.contains("hidden"), "{error}");
        let error = DatastoreSettings::from_url("postgres://u:hidden@h:port/d").unwrap_err();
        assert!(!error.message.contains("hidden"), "{error}");
    }
}
