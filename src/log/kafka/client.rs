//! What librdkafka's clients tell, and what their errors mean.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rdkafka::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::ConsumerContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};

use super::lock;
use crate::log::LogError;

/// What librdkafka complained of longer ago is over: while it lasts it is said again.
const LATELY: Duration = Duration::from_secs(60);

/// Takes librdkafka's log lines and errors. librdkafka goes on by itself after nearly all of them, so they are kept
/// to say why something is away, and logged for those who look closer.
#[derive(Clone, Default)]
pub(super) struct Told {
    last_error: Arc<Mutex<Option<(Instant, String)>>>,
}

impl Told {
    pub fn new() -> Self {
        Self::default()
    }

    /// What librdkafka complained of last, where that is not long ago.
    pub fn last_error(&self) -> Option<String> {
        let last = lock(&self.last_error).clone();
        last.filter(|(at, _)| at.elapsed() < LATELY).map(|(_, reason)| reason)
    }
}

impl ClientContext for Told {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        match level {
            RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical => {
                tracing::warn!(target: "librdkafka", "{facility}: {message}");
            }
            _ => tracing::debug!(target: "librdkafka", "{facility}: {message}"),
        }
    }

    fn stats_raw(&self, _: &[u8]) {}

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(target: "librdkafka", "{error}: {reason}");
        // That all are down is the sum of it; why each of them is says more.
        if error.rdkafka_error_code() != Some(RDKafkaErrorCode::AllBrokersDown) {
            *lock(&self.last_error) = Some((Instant::now(), reason.to_owned()));
        }
    }
}

impl ConsumerContext for Told {}

/// What to do about an error of librdkafka.
pub(super) fn fault(error: &KafkaError, told: &Told) -> LogError {
    use RDKafkaErrorCode as Code;
    let code = match error {
        KafkaError::AdminOp(code) => Some(*code),
        other => other.rdkafka_error_code(),
    };
    let Some(code) = code else {
        return LogError::Unavailable(error.to_string());
    };
    let why = told.last_error().map(|last| format!(" ({last})")).unwrap_or_default();
    match code {
        Code::MessageSizeTooLarge => LogError::Invalid(
            "Kafka refuses a record as too large. hint: raise 'message.max.bytes' of the log here, and \
             'max.message.bytes' of the topic"
                .into(),
        ),
        Code::TopicAuthorizationFailed
        | Code::GroupAuthorizationFailed
        | Code::ClusterAuthorizationFailed
        | Code::TransactionalIdAuthorizationFailed => {
            // It is granted without a word to us, and brokers hear of it one after the other.
            LogError::Unavailable(format!("Kafka does not allow it: {code}. hint: grant it to this user by an ACL"))
        }
        Code::InvalidReplicationFactor => LogError::Unavailable(format!(
            "Kafka has not as many brokers as the replication factor wants: {code}. hint: start those that are away, or \
             set a smaller one"
        )),
        Code::InvalidTopic
        | Code::InvalidPartitions
        | Code::InvalidConfig
        | Code::PolicyViolation
        | Code::InvalidRecord => LogError::Invalid(format!("Kafka refuses it: {code}")),
        Code::FencedInstanceId => LogError::Fenced(format!("another client has taken the place of this one: {code}")),
        // Among them what a broker says of a producer that it no longer knows: the next one is another.
        _ => LogError::Unavailable(format!("{error}{why}")),
    }
}

/// Kafka does not let this user do it: a client says so once, and not again while it lasts.
pub(super) fn is_denied(error: &KafkaError) -> bool {
    use RDKafkaErrorCode as Code;
    matches!(
        error.rdkafka_error_code(),
        Some(Code::TopicAuthorizationFailed | Code::GroupAuthorizationFailed | Code::ClusterAuthorizationFailed)
    )
}

/// A client can't be made though its settings were looked at: the system has no thread or no file for it just now.
pub(super) fn no_client(what: &str, error: &dyn std::fmt::Display) -> LogError {
    LogError::Unavailable(format!("the Kafka {what} can't be made: {error}"))
}

/// Runs what blocks on a thread for it. The deadline is for whoever waits: the work itself has its own.
pub(super) async fn blocking<T: Send + 'static>(
    deadline: Duration,
    work: impl FnOnce() -> Result<T, LogError> + Send + 'static,
) -> Result<T, LogError> {
    match tokio::time::timeout(deadline, tokio::task::spawn_blocking(work)).await {
        Ok(Ok(result)) => result,
        Ok(Err(panicked)) => Err(LogError::Fatal(format!("a question to Kafka ended: {panicked}"))),
        Err(_) => Err(LogError::Unavailable(format!("Kafka has not answered for {} s", deadline.as_secs()))),
    }
}
