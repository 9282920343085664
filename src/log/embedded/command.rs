//! What the commit thread is asked. Every command has a reply, which is answered once: with the commit that holds its
//! work, or with why there is none.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, oneshot};

use crate::event::{Offset, RecordBatch, TopicPartition};
use crate::log::{Appended, LogError, TopicSpec};

pub(super) type Reply<T> = oneshot::Sender<Result<T, LogError>>;

pub(super) struct Append {
    pub source: Arc<str>,
    pub generation: u64,
    pub batch: RecordBatch,
    pub position: Option<Vec<u8>>,
    pub in_flight: OwnedSemaphorePermit,
    pub reply: Reply<Appended>,
}

pub(super) enum Command {
    Append(Append),
    /// Answers with the generation of the new writer; earlier ones of `source` are fenced.
    OpenWriter {
        source: Arc<str>,
        reply: Reply<u64>,
    },
    EnsureTopic {
        spec: TopicSpec,
        reply: Reply<()>,
    },
    RegisterGroup {
        group: String,
        topics: Vec<String>,
        reply: Reply<()>,
    },
    RemoveGroup {
        group: String,
        reply: Reply<()>,
    },
    ForgetLosses {
        group: String,
        reply: Reply<()>,
    },
    CommitOffsets {
        group: String,
        offsets: BTreeMap<TopicPartition, Offset>,
        reply: Reply<()>,
    },
    Close {
        reply: Reply<()>,
    },
}

/// Answers a command that is not carried out.
pub(super) fn refuse(command: Command, error: &LogError) {
    let error = error.clone();
    match command {
        Command::Append(append) => drop(append.reply.send(Err(error))),
        Command::OpenWriter { reply, .. } => drop(reply.send(Err(error))),
        Command::EnsureTopic { reply, .. }
        | Command::RegisterGroup { reply, .. }
        | Command::RemoveGroup { reply, .. }
        | Command::ForgetLosses { reply, .. }
        | Command::CommitOffsets { reply, .. }
        | Command::Close { reply } => drop(reply.send(Err(error))),
    }
}
