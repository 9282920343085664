//! The log in Apache Kafka, through librdkafka.
//!
//! * [`settings`] makes the configurations of clients: every librdkafka setting is passed through, but those that
//!   carry a promise of this log are its own.
//! * [`producing`] has one idempotent producer a source, [`writer`] gives it batches, [`feeder`] settles them: a
//!   batch is durable when every record of it has been acknowledged by all in-sync replicas, and then its position, in
//!   a compacted topic of its own ([`positions`]).
//! * [`consumer`] and [`reader`] each own a thread, on which librdkafka's client lives.
//! * Without transactions the promise is at-least-once over a crash of this process: what a producer had on the
//!   way when it died may be there once more after it. Within a process an outage of the broker doubles nothing,
//!   since a producer outlives its writer.

mod client;
mod consumer;
mod feeder;
mod gather;
mod native;
mod positions;
mod producing;
mod reader;
mod settings;
mod writer;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use rdkafka::TopicPartitionList;
use rdkafka::admin::{AdminClient, AdminOptions, ConfigSource, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};

use self::client::{Told, blocking, fault};
use self::producing::Producing;
pub use self::settings::KafkaSettings;
use crate::event::{Offset, TopicPartition};
use crate::log::{
    Log, LogConsumer, LogError, LogReader, LogWriter, Loss, PartitionInfo, PartitionLag, StartAt, StopAt, TopicInfo,
    TopicSpec,
};

/// Every question to the brokers has an answer by then, or they count as away.
const ANSWER_WAIT: Duration = Duration::from_secs(10);

pub struct KafkaLog {
    inside: Arc<Inside>,
}

/// What writers, consumers and questions share.
struct Inside {
    settings: KafkaSettings,
    admin: AdminClient<Told>,
    told: Told,
    /// Asks for metadata and offsets; belongs to no group.
    asking: Arc<BaseConsumer<Told>>,
    /// One producer a source, which outlives its writers.
    producers: Mutex<HashMap<String, Arc<Producing>>>,
    /// Topics seen to exist.
    known: Mutex<HashSet<Arc<str>>>,
    /// Clients that ask for the offsets of a group, and the topics the group is known to read.
    groups: Mutex<HashMap<String, KnownGroup>>,
}

#[derive(Clone)]
struct KnownGroup {
    asking: Arc<BaseConsumer<Told>>,
    topics: Vec<String>,
}

impl KafkaLog {
    /// Checks the settings; does not need the brokers to be there. Errors: [`LogError::Invalid`].
    pub async fn open(settings: KafkaSettings) -> Result<Self, LogError> {
        settings.check()?;
        let told = Told::new();
        let invalid = |e: KafkaError| LogError::Invalid(format!("the Kafka client can't be made: {e}"));
        let admin = settings.client()?.create_with_context(told.clone()).map_err(invalid)?;
        let asking = Arc::new(settings.asking(None)?.create_with_context(told.clone()).map_err(invalid)?);
        let inside = Inside {
            settings,
            admin,
            told,
            asking,
            producers: Mutex::default(),
            known: Mutex::default(),
            groups: Mutex::default(),
        };
        let inside = Arc::new(inside);
        tokio::spawn(drain_all(Arc::downgrade(&inside)));
        Ok(KafkaLog { inside })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inside {
    fn fault(&self, error: &KafkaError) -> LogError {
        // Why it is away (a wrong password, a refused certificate) waits to be said.
        serve(&self.asking);
        fault(error, &self.told)
    }

    /// Partitions of every topic, or of one (empty when it does not exist).
    async fn partitions(self: &Arc<Self>) -> Result<BTreeMap<String, Vec<i32>>, LogError> {
        let inside = self.clone();
        blocking(ANSWER_WAIT * 3, move || {
            // Asking for one topic by name might make it; asking for all never does.
            let metadata = inside.asking.fetch_metadata(None, ANSWER_WAIT).map_err(|e| inside.fault(&e))?;
            let partitions = |topic: &rdkafka::metadata::MetadataTopic| {
                let mut ids: Vec<i32> = topic.partitions().iter().map(|partition| partition.id()).collect();
                ids.sort_unstable();
                (topic.name().to_owned(), ids)
            };
            Ok(metadata.topics().iter().map(partitions).collect())
        })
        .await
    }

    async fn partitions_of(self: &Arc<Self>, topic: &str) -> Result<Vec<i32>, LogError> {
        let all = self.partitions().await?;
        all.get(topic).filter(|ids| !ids.is_empty()).cloned().ok_or_else(|| LogError::UnknownTopic(topic.to_owned()))
    }

    /// True when the topic is there.
    async fn knows(self: &Arc<Self>, topic: &Arc<str>) -> Result<bool, LogError> {
        if lock(&self.known).contains(topic) {
            return Ok(true);
        }
        let all = self.partitions().await?;
        let mut known = lock(&self.known);
        known.extend(all.into_keys().map(Arc::from));
        Ok(known.contains(topic))
    }

    /// Offsets that `start` means, for each of `places`.
    async fn resolve(
        self: &Arc<Self>,
        places: Vec<TopicPartition>,
        start: StartAt,
    ) -> Result<BTreeMap<TopicPartition, Offset>, LogError> {
        let at = match start {
            StartAt::Offset(offset) => return Ok(places.into_iter().map(|place| (place, offset)).collect()),
            StartAt::Beginning => rdkafka::Offset::Beginning,
            StartAt::End => rdkafka::Offset::End,
            StartAt::TimeMs(time) => rdkafka::Offset::Offset(time.max(0)),
        };
        let inside = self.clone();
        blocking(ANSWER_WAIT * 3, move || {
            let ask = |at: rdkafka::Offset| {
                let list = list_of(places.iter().map(|place| (place, at)))?;
                let answer = coordinated(|| {
                    let answer = inside.asking.offsets_for_times(list.clone(), ANSWER_WAIT)?;
                    answer.elements().iter().try_for_each(|element| element.error())?;
                    Ok(answer)
                });
                answer.map_err(|e| inside.fault(&e))
            };
            let answer = ask(at)?;
            let mut found = BTreeMap::new();
            for element in answer.elements() {
                if let rdkafka::Offset::Offset(offset) = element.offset() {
                    found.insert(TopicPartition::new(element.topic(), element.partition()), Offset(offset));
                }
            }
            // No record that late: the end.
            if found.len() < places.len() {
                for element in ask(rdkafka::Offset::End)?.elements() {
                    let place = TopicPartition::new(element.topic(), element.partition());
                    if let rdkafka::Offset::Offset(offset) = element.offset() {
                        found.entry(place).or_insert(Offset(offset));
                    }
                }
            }
            Ok(found)
        })
        .await
    }

    /// The client that asks and sets the offsets of `group`, and never joins it.
    fn group(&self, group: &str, topics: &[String]) -> Result<KnownGroup, LogError> {
        let mut groups = lock(&self.groups);
        if !groups.contains_key(group) {
            let asking = self.settings.asking(Some(group))?.create_with_context(self.told.clone());
            let asking = Arc::new(asking.map_err(|e| client::no_client("client", &e))?);
            groups.insert(group.to_owned(), KnownGroup { asking, topics: Vec::new() });
        }
        let Some(known) = groups.get_mut(group) else {
            return Err(LogError::Fatal(format!("group '{group}' was forgotten while it was asked for")));
        };
        if !topics.is_empty() {
            known.topics = topics.to_vec();
        }
        Ok(known.clone())
    }

    /// The group's committed offsets in `places`; those it has not committed are left out.
    async fn committed(
        self: &Arc<Self>,
        group: &str,
        places: Vec<TopicPartition>,
    ) -> Result<BTreeMap<TopicPartition, Offset>, LogError> {
        let inside = self.clone();
        let asking = self.group(group, &[])?.asking;
        blocking(ANSWER_WAIT * 3, move || {
            let list = list_of(places.iter().map(|place| (place, rdkafka::Offset::Invalid)))?;
            let answer =
                coordinated(|| asking.committed_offsets(list.clone(), ANSWER_WAIT)).map_err(|e| inside.fault(&e))?;
            Ok(offsets_of(&answer))
        })
        .await
    }

    async fn set_committed(
        self: &Arc<Self>,
        group: &str,
        offsets: BTreeMap<TopicPartition, Offset>,
    ) -> Result<(), LogError> {
        if offsets.is_empty() {
            return Ok(());
        }
        let inside = self.clone();
        let asking = self.group(group, &[])?.asking;
        blocking(ANSWER_WAIT * 3, move || {
            let list = list_of(offsets.iter().map(|(place, offset)| (place, rdkafka::Offset::Offset(offset.0))))?;
            coordinated(|| asking.commit(&list, CommitMode::Sync)).map_err(|e| inside.fault(&e))
        })
        .await
    }

    async fn group_is_idle(self: &Arc<Self>, group: &str, what: &str) -> Result<(), LogError> {
        let inside = self.clone();
        let name = group.to_owned();
        let members = blocking(ANSWER_WAIT * 3, move || {
            let list = coordinated(|| inside.asking.fetch_group_list(Some(&name), ANSWER_WAIT))
                .map_err(|e| inside.fault(&e))?;
            Ok(list.groups().iter().filter(|found| found.name() == name).map(|found| found.members().len()).sum())
        });
        let members: usize = members.await?;
        if members == 0 {
            return Ok(());
        }
        Err(LogError::Invalid(format!(
            "group '{group}' has {members} running consumers and can't be {what}. hint: pause its connector first"
        )))
    }
}

/// Asks again while a group's coordinator, or a leader (of a topic made just now, or one that was elected anew), is
/// starting.
fn coordinated<T>(ask: impl Fn() -> Result<T, KafkaError>) -> Result<T, KafkaError> {
    use RDKafkaErrorCode as Code;
    let give_up = Instant::now() + ANSWER_WAIT;
    loop {
        match ask() {
            Err(error)
                if Instant::now() < give_up
                    && matches!(
                        error.rdkafka_error_code(),
                        Some(
                            Code::CoordinatorLoadInProgress
                                | Code::CoordinatorNotAvailable
                                | Code::NotCoordinator
                                | Code::NotLeaderForPartition
                                | Code::LeaderNotAvailable
                                | Code::FencedLeaderEpoch
                                | Code::UnknownLeaderEpoch
                        )
                    ) =>
            {
                std::thread::sleep(Duration::from_millis(100));
            }
            answer => return answer,
        }
    }
}

/// Serves what the clients that are only asked have to say (their log lines), so that nothing piles up during a
/// long outage. Ends with the log.
async fn drain_all(inside: Weak<Inside>) {
    loop {
        tokio::time::sleep(Duration::from_secs(5)).await;
        let Some(inside) = inside.upgrade() else { return };
        let groups: Vec<_> = lock(&inside.groups).values().map(|group| group.asking.clone()).collect();
        for asking in groups.iter().chain([&inside.asking]) {
            serve(asking);
        }
    }
}

fn serve(asking: &BaseConsumer<Told>) {
    // A poll that served a log line gives nothing, as does one that found nothing: neither is the end.
    for _ in 0..100 {
        let _ = asking.poll(Duration::ZERO);
    }
}

fn list_of<'a>(
    places: impl Iterator<Item = (&'a TopicPartition, rdkafka::Offset)>,
) -> Result<TopicPartitionList, LogError> {
    let mut list = TopicPartitionList::new();
    for (place, offset) in places {
        list.add_partition_offset(&place.topic, place.partition, offset)
            .map_err(|e| LogError::Invalid(format!("{place}: {e}")))?;
    }
    Ok(list)
}

fn offsets_of(list: &TopicPartitionList) -> BTreeMap<TopicPartition, Offset> {
    let numbered = list.elements().into_iter().filter_map(|element| match element.offset() {
        rdkafka::Offset::Offset(offset) => {
            Some((TopicPartition::new(element.topic(), element.partition()), Offset(offset)))
        }
        _ => None,
    });
    numbered.collect()
}

fn places_of(topic: &str, partitions: &[i32]) -> Vec<TopicPartition> {
    let topic: Arc<str> = topic.into();
    partitions.iter().map(|partition| TopicPartition::new(topic.clone(), *partition)).collect()
}

#[async_trait]
impl Log for KafkaLog {
    fn kind(&self) -> &'static str {
        "kafka"
    }

    async fn ensure_topic(&self, topic: &TopicSpec) -> Result<(), LogError> {
        let name: Arc<str> = topic.name.as_str().into();
        if self.inside.knows(&name).await? {
            return Ok(());
        }
        // -1: the broker's default.
        let replication = TopicReplication::Fixed(topic.replication_factor.unwrap_or(-1));
        let mut new = NewTopic::new(&topic.name, topic.partitions, replication);
        for (name, value) in &topic.settings {
            new = new.set(name, value);
        }
        let options = AdminOptions::new().request_timeout(Some(ANSWER_WAIT)).operation_timeout(Some(ANSWER_WAIT));
        let answers = self.inside.admin.create_topics([&new], &options).await.map_err(|e| self.inside.fault(&e))?;
        for answer in answers {
            match answer {
                Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((topic, code)) => {
                    let error = self.inside.fault(&KafkaError::AdminOp(code));
                    return Err(match error {
                        LogError::Unavailable(text) => LogError::Unavailable(format!("topic '{topic}': {text}")),
                        _ => LogError::Invalid(format!(
                            "Kafka does not make topic '{topic}': {code}. hint: look at its partitions, replication \
                             factor and settings: {:?}",
                            new.config
                        )),
                    });
                }
            }
        }
        // The broker that is asked next may not have heard of it for a moment.
        let give_up = tokio::time::Instant::now() + ANSWER_WAIT;
        while !self.inside.knows(&name).await? {
            if tokio::time::Instant::now() > give_up {
                return Err(LogError::Unavailable(format!("topic '{name}' was made and does not show")));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    async fn topics(&self) -> Result<Vec<TopicInfo>, LogError> {
        let mut all = self.inside.partitions().await?;
        all.retain(|name, _| !name.starts_with("__"));
        let places: Vec<_> = all.iter().flat_map(|(name, partitions)| places_of(name, partitions)).collect();
        let first = self.inside.resolve(places.clone(), StartAt::Beginning).await?;
        let next = self.inside.resolve(places, StartAt::End).await?;
        let asked: Vec<_> = all.keys().map(|name| ResourceSpecifier::Topic(name)).collect();
        let options = AdminOptions::new().request_timeout(Some(ANSWER_WAIT));
        let described =
            self.inside.admin.describe_configs(&asked, &options).await.map_err(|e| self.inside.fault(&e))?;
        let settings: Vec<BTreeMap<String, String>> = described
            .into_iter()
            .map(|resource| {
                let entries = resource.map(|resource| resource.entries).unwrap_or_default();
                let own = entries.into_iter().filter(|entry| matches!(entry.source, ConfigSource::DynamicTopic));
                own.filter_map(|entry| Some((entry.name, entry.value?))).collect()
            })
            .collect();
        let info = |((name, partitions), settings): ((String, Vec<i32>), BTreeMap<String, String>)| TopicInfo {
            partitions: places_of(&name, &partitions)
                .into_iter()
                .map(|place| PartitionInfo {
                    partition: place.partition,
                    first: first.get(&place).copied().unwrap_or_default(),
                    next: next.get(&place).copied().unwrap_or_default(),
                    bytes: None,
                })
                .collect(),
            name,
            settings,
        };
        Ok(all.into_iter().zip(settings).map(info).collect())
    }

    async fn writer(&self, source: &str) -> Result<Box<dyn LogWriter>, LogError> {
        writer::open(&self.inside, source).await
    }

    async fn position(&self, source: &str) -> Result<Option<Vec<u8>>, LogError> {
        match positions::read(&self.inside, source).await {
            Err(LogError::UnknownTopic(_)) => Ok(None),
            read => read,
        }
    }

    async fn consumer(&self, group: &str, topics: &[String]) -> Result<Box<dyn LogConsumer>, LogError> {
        self.inside.group(group, topics)?;
        consumer::join(self.inside.clone(), group, topics)
    }

    async fn reader(&self, topic: &str, start: StartAt, stop: StopAt) -> Result<Box<dyn LogReader>, LogError> {
        let places = places_of(topic, &self.inside.partitions_of(topic).await?);
        let from = self.inside.resolve(places.clone(), start).await?;
        let until = match stop {
            StopAt::Never => None,
            StopAt::End => Some(self.inside.resolve(places, StartAt::End).await?),
        };
        reader::open(self.inside.clone(), from, until)
    }

    async fn group_lag(&self, group: &str) -> Result<Vec<PartitionLag>, LogError> {
        let known = self.inside.group(group, &[])?.topics;
        let all = self.inside.partitions().await?;
        let places: Vec<_> = all
            .iter()
            .filter(|(name, _)| known.contains(name) || (known.is_empty() && !name.starts_with("__")))
            .flat_map(|(name, partitions)| places_of(name, partitions))
            .collect();
        let committed = self.inside.committed(group, places.clone()).await?;
        // Without a consumer of it in this process, the group's topics are those it has committed offsets of.
        let places: Vec<_> =
            places.into_iter().filter(|place| !known.is_empty() || committed.contains_key(place)).collect();
        if places.is_empty() {
            return Ok(Vec::new());
        }
        let ends = self.inside.resolve(places.clone(), StartAt::End).await?;
        let unread = places.iter().filter(|place| !committed.contains_key(place)).cloned().collect::<Vec<_>>();
        let firsts = match unread.is_empty() {
            true => Default::default(),
            false => self.inside.resolve(unread, StartAt::Beginning).await?,
        };
        let lag = |place: TopicPartition| PartitionLag {
            committed: committed.get(&place).copied(),
            from: committed.get(&place).or(firsts.get(&place)).copied().unwrap_or_default(),
            end: ends.get(&place).copied().unwrap_or_default(),
            topic_partition: place,
        };
        Ok(places.into_iter().map(lag).collect())
    }

    async fn reset_group(&self, group: &str, topics: &[String], start: StartAt) -> Result<(), LogError> {
        self.inside.group_is_idle(group, "reset").await?;
        let topics: BTreeSet<String> = match topics {
            [] => self.group_lag(group).await?.iter().map(|lag| lag.topic_partition.topic.to_string()).collect(),
            topics => topics.iter().cloned().collect(),
        };
        let mut places = Vec::new();
        for topic in &topics {
            places.extend(places_of(topic, &self.inside.partitions_of(topic).await?));
        }
        let offsets = self.inside.resolve(places.clone(), start).await?;
        let first = self.inside.resolve(places.clone(), StartAt::Beginning).await?;
        let next = self.inside.resolve(places, StartAt::End).await?;
        for (place, wanted) in &offsets {
            let (first, next) =
                (first.get(place).copied().unwrap_or_default(), next.get(place).copied().unwrap_or_default());
            if !(first..=next).contains(wanted) {
                let topic_partition = place.clone();
                return Err(LogError::OutOfRange { topic_partition, wanted: *wanted, first, next });
            }
        }
        self.inside.set_committed(group, offsets).await
    }

    /// Kafka's retention knows no groups. The group's topics are noted, so that its lag can be told before its first
    /// commit.
    async fn register_group(&self, group: &str, topics: &[String]) -> Result<(), LogError> {
        self.inside.group(group, topics)?;
        Ok(())
    }

    async fn losses(&self) -> Result<Vec<Loss>, LogError> {
        Ok(Vec::new())
    }

    async fn remove_group(&self, group: &str) -> Result<(), LogError> {
        self.inside.group_is_idle(group, "removed").await?;
        let options = AdminOptions::new().request_timeout(Some(ANSWER_WAIT));
        let answers = self.inside.admin.delete_groups(&[group], &options).await.map_err(|e| self.inside.fault(&e))?;
        for answer in answers {
            match answer {
                Ok(_) | Err((_, RDKafkaErrorCode::GroupIdNotFound)) => {}
                Err((_, code)) => return Err(self.inside.fault(&KafkaError::AdminOp(code))),
            }
        }
        lock(&self.inside.groups).remove(group);
        Ok(())
    }

    async fn close(&self) -> Result<(), LogError> {
        let producers: Vec<_> = lock(&self.inside.producers).drain().collect();
        let mut result = Ok(());
        for (_, producing) in producers {
            result = result.and(producing.close().await);
        }
        result
    }
}
