//! Messages of the `pgoutput` plugin, protocol version 1, as views into received bytes.
//!
//! Format: PostgreSQL documentation, "Logical Replication Message Formats". Decoding never panics and never reads
//! past what it is given; it allocates for a relation only, which is rare.

use std::sync::Arc;

use crate::event::{Cell, Lsn, Oid, ReplicaIdentity};

use super::PostgresError;
use super::frames::Reader;

/// Microseconds from 1970-01-01 to 2000-01-01, PostgreSQL's own epoch.
pub const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;

/// One message; row values are in the buffers given to [`decode`].
#[derive(Clone, Debug, PartialEq)]
pub enum Message<'a> {
    /// `commit_lsn` is where the commit record starts; time in microseconds since 1970.
    Begin {
        commit_lsn: Lsn,
        commit_time_us: i64,
        xid: u32,
    },
    Commit {
        commit_lsn: Lsn,
        end_lsn: Lsn,
        commit_time_us: i64,
    },
    /// The replication origin that the transaction came with.
    Origin {
        lsn: Lsn,
        name: &'a str,
    },
    Relation(Arc<Relation>),
    /// A type's name, sent for types that are not built in.
    Type {
        oid: Oid,
    },
    /// `new` is filled.
    Insert {
        relation: Oid,
    },
    /// `new` is filled, and `old` as far as `old` here says.
    Update {
        relation: Oid,
        old: OldRow,
    },
    /// `old` is filled.
    Delete {
        relation: Oid,
        old: OldRow,
    },
    Truncate {
        relations: Relations<'a>,
        cascade: bool,
        restart_identity: bool,
    },
    LogicalMessage {
        transactional: bool,
        lsn: Lsn,
        prefix: &'a str,
        content: &'a [u8],
    },
}

/// What is known of the row before the change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OldRow {
    None,
    /// The columns of the replica identity; the others are null.
    Key,
    Full,
}

/// A table as the WAL has it: what its rows look like from here on.
#[derive(Clone, Debug, PartialEq)]
pub struct Relation {
    pub oid: Oid,
    pub schema: String,
    pub name: String,
    pub replica_identity: ReplicaIdentity,
    pub columns: Vec<RelationColumn>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct RelationColumn {
    /// Part of the replica identity (every column, where that is full).
    pub identity: bool,
    pub name: String,
    pub type_oid: Oid,
    pub type_modifier: i32,
}

/// Oids of truncated tables.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Relations<'a>(&'a [u8]);

impl Relations<'_> {
    pub fn iter(&self) -> impl Iterator<Item = Oid> {
        self.0.as_chunks::<4>().0.iter().map(|oid| Oid(u32::from_be_bytes(*oid)))
    }
}

/// Decodes one message. `old` and `new` are emptied, then filled with the rows it carries.
pub fn decode<'a>(
    bytes: &'a [u8],
    old: &mut Vec<Cell<'a>>,
    new: &mut Vec<Cell<'a>>,
) -> Result<Message<'a>, PostgresError> {
    old.clear();
    new.clear();
    let mut reader = Reader::new(bytes);
    Ok(match reader.u8()? {
        b'B' => {
            Message::Begin { commit_lsn: Lsn(reader.u64()?), commit_time_us: time(&mut reader)?, xid: reader.u32()? }
        }
        b'C' => {
            reader.u8()?;
            Message::Commit {
                commit_lsn: Lsn(reader.u64()?),
                end_lsn: Lsn(reader.u64()?),
                commit_time_us: time(&mut reader)?,
            }
        }
        b'O' => Message::Origin { lsn: Lsn(reader.u64()?), name: reader.text()? },
        b'R' => Message::Relation(Arc::new(relation(&mut reader)?)),
        b'Y' => Message::Type { oid: Oid(reader.u32()?) },
        b'I' => {
            let relation = Oid(reader.u32()?);
            match reader.u8()? {
                b'N' => tuple(&mut reader, new)?,
                other => return Err(unknown("tuple of an insert", other)),
            }
            Message::Insert { relation }
        }
        b'U' => {
            let relation = Oid(reader.u32()?);
            let kind = match reader.u8()? {
                b'N' => OldRow::None,
                kind => {
                    let kind = old_kind(kind)?;
                    tuple(&mut reader, old)?;
                    match reader.u8()? {
                        b'N' => kind,
                        other => return Err(unknown("tuple of an update", other)),
                    }
                }
            };
            tuple(&mut reader, new)?;
            Message::Update { relation, old: kind }
        }
        b'D' => {
            let relation = Oid(reader.u32()?);
            let kind = old_kind(reader.u8()?)?;
            tuple(&mut reader, old)?;
            Message::Delete { relation, old: kind }
        }
        b'T' => {
            let count = reader.u32()? as usize;
            let options = reader.u8()?;
            let wanted = count.checked_mul(4).filter(|wanted| *wanted <= reader.rest().len());
            let wanted = wanted.ok_or_else(|| PostgresError::Protocol("a truncate ends too early".into()))?;
            Message::Truncate {
                relations: Relations(reader.bytes(wanted)?),
                cascade: options & 1 != 0,
                restart_identity: options & 2 != 0,
            }
        }
        b'M' => {
            let transactional = reader.u8()? & 1 != 0;
            let lsn = Lsn(reader.u64()?);
            let prefix = reader.text()?;
            let length = reader.u32()? as usize;
            Message::LogicalMessage { transactional, lsn, prefix, content: reader.bytes(length)? }
        }
        other => return Err(unknown("message", other)),
    })
}

fn unknown(what: &str, tag: u8) -> PostgresError {
    PostgresError::Protocol(format!("pgoutput: unknown {what} '{}'", tag.escape_ascii()))
}

fn time(reader: &mut Reader<'_>) -> Result<i64, PostgresError> {
    Ok(reader.i64()?.saturating_add(POSTGRES_EPOCH_US))
}

fn old_kind(tag: u8) -> Result<OldRow, PostgresError> {
    match tag {
        b'K' => Ok(OldRow::Key),
        b'O' => Ok(OldRow::Full),
        other => Err(unknown("old tuple", other)),
    }
}

#[inline]
fn tuple<'a>(reader: &mut Reader<'a>, cells: &mut Vec<Cell<'a>>) -> Result<(), PostgresError> {
    let count = usize::from(reader.u16()?);
    cells.reserve(count);
    for _ in 0..count {
        cells.push(match reader.u8()? {
            b't' => {
                let length = reader.u32()? as usize;
                Cell::Text(reader.bytes(length)?)
            }
            b'n' => Cell::Null,
            b'u' => Cell::Unchanged,
            other => return Err(unknown("kind of value", other)),
        });
    }
    Ok(())
}

fn relation(reader: &mut Reader<'_>) -> Result<Relation, PostgresError> {
    let oid = Oid(reader.u32()?);
    let schema = match reader.text()? {
        // pgoutput leaves the name of pg_catalog out.
        "" => "pg_catalog",
        schema => schema,
    };
    let schema = schema.to_owned();
    let name = reader.text()?.to_owned();
    let replica_identity = replica_identity(reader.u8()?)?;
    let count = reader.u16()?;
    let mut columns = Vec::with_capacity(usize::from(count).min(2000));
    for _ in 0..count {
        columns.push(RelationColumn {
            identity: reader.u8()? & 1 != 0,
            name: reader.text()?.to_owned(),
            type_oid: Oid(reader.u32()?),
            type_modifier: reader.i32()?,
        });
    }
    Ok(Relation { oid, schema, name, replica_identity, columns })
}

/// `pg_class.relreplident`
pub(super) fn replica_identity(letter: u8) -> Result<ReplicaIdentity, PostgresError> {
    Ok(match letter {
        b'd' => ReplicaIdentity::Default,
        b'n' => ReplicaIdentity::Nothing,
        b'f' => ReplicaIdentity::Full,
        b'i' => ReplicaIdentity::Index,
        other => return Err(unknown("replica identity", other)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(bytes: &[u8]) -> Result<(Message<'_>, Vec<Cell<'_>>, Vec<Cell<'_>>), PostgresError> {
        let (mut old, mut new) = (Vec::new(), Vec::new());
        let message = decode(bytes, &mut old, &mut new)?;
        Ok((message, old, new))
    }

    #[test]
    fn an_update_carries_its_old_key_and_marks_unchanged_toast() {
        let bytes = b"U\0\0\0\x07K\0\x02t\0\0\0\x011nN\0\x02t\0\0\0\x012u";
        let (message, old, new) = decoded(bytes).unwrap();
        assert_eq!(message, Message::Update { relation: Oid(7), old: OldRow::Key });
        assert_eq!(old, [Cell::Text(b"1"), Cell::Null]);
        assert_eq!(new, [Cell::Text(b"2"), Cell::Unchanged]);
    }

    #[test]
    fn a_message_cut_anywhere_is_an_error_and_no_panic() {
        let whole: [&[u8]; 4] = [
            b"U\0\0\0\x07K\0\x02t\0\0\0\x011nN\0\x02t\0\0\0\x012u",
            b"R\0\0\0\x07public\0t\0d\0\x01\x01id\0\0\0\0\x17\xff\xff\xff\xff",
            b"T\0\0\0\x02\0\0\0\0\x01\0\0\0\x02",
            b"M\x01\0\0\0\0\0\0\0\x09p\0\0\0\0\x02hi",
        ];
        for bytes in whole {
            assert!(decoded(bytes).is_ok());
            for end in 0..bytes.len() {
                assert!(decoded(&bytes[..end]).is_err(), "{end} of {bytes:?}");
            }
        }
        assert!(decoded(b"T\xff\xff\xff\xff\0").is_err());
    }

    #[test]
    fn times_are_since_1970() {
        let mut bytes = b"B\0\0\0\0\0\0\0\x10".to_vec();
        bytes.extend(0i64.to_be_bytes());
        bytes.extend(5u32.to_be_bytes());
        let expected = Message::Begin { commit_lsn: Lsn(16), commit_time_us: 946_684_800_000_000, xid: 5 };
        assert_eq!(decoded(&bytes).unwrap().0, expected);
    }
}
