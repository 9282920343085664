//! What librdkafka's clients tell, and what their errors mean.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use rdkafka::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::ConsumerContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};

use super::lock;
use crate::log::LogError;

/// Takes librdkafka's log lines and errors. librdkafka goes on by itself after nearly all of them, so they are kept
/// to say why something is away, and logged for those who look closer.
#[derive(Clone, Default)]
pub(super) struct Told {
    last_error: Arc<Mutex<Option<String>>>,
}

impl Told {
    pub fn new() -> Self {
        Self::default()
    }

    /// What librdkafka complained of last.
    pub fn last_error(&self) -> Option<String> {
        lock(&self.last_error).clone()
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
            *lock(&self.last_error) = Some(reason.to_owned());
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
            LogError::Invalid(format!("Kafka does not allow it: {code}. hint: grant it to this user by an ACL"))
        }
        Code::InvalidTopic
        | Code::InvalidPartitions
        | Code::InvalidReplicationFactor
        | Code::InvalidConfig
        | Code::PolicyViolation
        | Code::InvalidRecord
        | Code::UnsupportedVersion => LogError::Invalid(format!("Kafka refuses it: {code}")),
        Code::FencedInstanceId | Code::ProducerFenced | Code::InvalidProducerEpoch => {
            LogError::Fenced(format!("another client has taken the place of this one: {code}"))
        }
        _ => LogError::Unavailable(format!("{error}{why}")),
    }
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
