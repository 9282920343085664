//! The settings of one system, as its part of the worker's file says them.

use std::path::PathBuf;
use std::time::Duration;

use reqwest::Url;

use super::auth::AuthSettings;
use super::budget::Limit;
use super::classes::Rule;
use super::template::header_tree;
use super::{BreakerSettings, RequestTemplate};
use crate::config::{ByteSize, ConfigError, Section, Spanned};
use crate::mapping::{Compiler, Tree};

pub struct SystemSettings {
    pub name: String,
    pub(super) base_url: Url,
    pub(super) compiler: Compiler,
    pub(super) auth: AuthSettings,
    pub(super) headers: Option<Tree>,
    pub(super) limits: Vec<Limit>,
    pub(super) concurrency: Option<usize>,
    pub(super) timeouts: Timeouts,
    pub(super) probe: Option<RequestTemplate>,
    pub(super) breaker: BreakerSettings,
    pub(super) rules: Vec<Rule>,
    /// A longer body is an error, not a full memory.
    pub(super) response_limit: ByteSize,
    /// PEM file of authorities to trust beside the machine's.
    pub(super) root_certificate: Option<Spanned<PathBuf>>,
}

#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    pub connect: Duration,
    /// From the first byte sent to the last one of the answer.
    pub request: Duration,
    pub probe: Duration,
    /// How long a request waits for its turn in the budget.
    pub turn: Duration,
}

impl SystemSettings {
    pub fn read(name: &str, mut section: Section) -> Result<Self, ConfigError> {
        let base_url: Spanned<String> = section.require("base_url")?;
        let base_url = match Url::parse(base_url.trim_end_matches('/')) {
            Ok(url) if matches!(url.scheme(), "http" | "https") && url.has_host() => url,
            Ok(_) | Err(_) => {
                return Err(ConfigError::new(&base_url.place, "`base_url` is no http or https URL")
                    .hint("for example `https://erp.example/api`"));
            }
        };
        if !base_url.username().is_empty() || base_url.password().is_some() {
            return Err(section
                .error("base_url", "`base_url` must not hold credentials")
                .hint("give them as `auth: { type: basic, username: …, password: \"${env:…}\" }`"));
        }
        let define: Option<Spanned<String>> = section.take("define")?;
        let compiler = Compiler::new(define.as_ref())?;
        let auth = match section.section("auth")? {
            None => AuthSettings::None,
            Some(auth) => AuthSettings::read(auth, &compiler)?,
        };
        let headers = section.node("headers")?.map(|node| header_tree(&node, &compiler)).transpose()?;
        let (limits, concurrency) = read_budget(&mut section)?;
        let timeouts = Timeouts {
            connect: section.or("timeouts.connect", Duration::from_secs(5))?,
            request: section.or("timeouts.request", Duration::from_secs(30))?,
            probe: section.or("timeouts.probe", Duration::from_secs(5))?,
            turn: section.or("timeouts.turn", Duration::from_secs(60))?,
        };
        let probe = section.node("probe")?.map(|node| RequestTemplate::read_plain(&node, &compiler)).transpose()?;
        let defaults = BreakerSettings::default();
        let breaker = BreakerSettings {
            failures: section.or("breaker.failures", defaults.failures)?.max(1),
            open: section.or("breaker.open", defaults.open)?,
        };
        let rules = section.sections("errors")?;
        let rules = rules.into_iter().map(|rule| Rule::read(rule, &compiler)).collect::<Result<Vec<_>, _>>()?;
        let settings = SystemSettings {
            name: name.to_owned(),
            base_url,
            compiler,
            auth,
            headers,
            limits,
            concurrency,
            timeouts,
            probe,
            breaker,
            rules,
            root_certificate: section.take("sslrootcert")?,
            response_limit: section.or("response.limit", ByteSize(64 * 1024 * 1024))?,
        };
        section.finish()?;
        Ok(settings)
    }
}

/// One limit, or a list of them that all hold; the least `concurrency` of them counts.
fn read_budget(section: &mut Section) -> Result<(Vec<Limit>, Option<usize>), ConfigError> {
    let mut limits = Vec::new();
    let mut concurrency: Option<usize> = None;
    for mut entry in section.sections("budget")? {
        let requests: Option<Spanned<u32>> = entry.take("requests")?;
        let per: Option<Duration> = entry.take("per")?;
        if let Some(in_flight) = entry.take::<Spanned<usize>>("concurrency")? {
            if in_flight.value == 0 {
                return Err(ConfigError::new(&in_flight.place, "`concurrency` must be at least 1"));
            }
            concurrency = Some(concurrency.map_or(in_flight.value, |least| least.min(in_flight.value)));
        }
        match (requests, per) {
            (Some(requests), _) if requests.value == 0 => {
                return Err(ConfigError::new(&requests.place, "`requests` must be at least 1"));
            }
            (Some(_), Some(per)) if per.is_zero() => return Err(entry.error("per", "`per` must be more than 0")),
            (Some(requests), per) => {
                limits.push(Limit { requests: requests.value, per: per.unwrap_or(Duration::from_secs(1)) })
            }
            (None, Some(_)) => return Err(entry.missing("requests")),
            (None, None) => {}
        }
        entry.finish()?;
    }
    Ok((limits, concurrency))
}
