//! The publication: made for just the tables asked for, and brought up to date where that is allowed.

use std::time::Duration;

use super::catalog::CatalogTable;
use super::{PostgresError, Session, identifier, literal, qualified};

const DEADLINE: Duration = Duration::from_secs(30);

/// `publication.autocreate.mode`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Autocreate {
    /// `FOR ALL TABLES`; needs a superuser.
    AllTables,
    /// Just the tables asked for.
    Filtered,
    /// It must be there.
    Disabled,
}

/// A publication as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Publication {
    pub all_tables: bool,
    pub via_root: bool,
    /// By the present role, directly or through a role it is in: others can't add tables.
    pub owned: bool,
    /// Operations it leaves out.
    pub missing_operations: Vec<&'static str>,
    /// Tables it covers, partitions told one by one unless `via_root`.
    pub tables: Vec<Published>,
}

/// A table of a publication, and how much of it the stream will have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Published {
    pub schema: String,
    pub name: String,
    /// Names of the columns; `None` where the server does not say.
    pub columns: Option<Vec<String>>,
    /// An SQL condition that rows must meet.
    pub filter: Option<String>,
}

impl Publication {
    pub fn has(&self, schema: &str, name: &str) -> bool {
        self.all_tables || self.of(schema, name).is_some()
    }

    /// What makes it no good for a capture, whatever its tables are.
    pub fn wrong(&self, name: &str, via_root: bool) -> Option<String> {
        if !self.missing_operations.is_empty() {
            return Some(format!(
                "publication '{name}' does not publish {}; hint: ALTER PUBLICATION {} SET (publish = 'insert, update, \
                 delete, truncate')",
                self.missing_operations.join(", "),
                identifier(name)
            ));
        }
        (self.via_root != via_root).then(|| {
            format!(
                "publication '{name}' has publish_via_partition_root = {}, and publish.via.partition.root is \
                 {via_root}; hint: make them the same",
                self.via_root
            )
        })
    }

    pub fn of(&self, schema: &str, name: &str) -> Option<&Published> {
        self.tables.iter().find(|table| table.schema == schema && table.name == name)
    }
}

pub async fn find(session: &mut Session, name: &str) -> Result<Option<Publication>, PostgresError> {
    let rows = session
        .query(
            &format!(
                "SELECT puballtables, pubviaroot, pubinsert, pubupdate, pubdelete, pubtruncate, \
                 pg_has_role(pubowner, 'USAGE') \
                 FROM pg_publication WHERE pubname = {}",
                literal(name)
            ),
            DEADLINE,
        )
        .await?;
    let Some(row) = rows.first() else { return Ok(None) };
    let flag = |at: usize| row.get(at).and_then(Option::as_deref) == Some("t");
    let operations = ["insert", "update", "delete", "truncate"];
    let missing_operations =
        operations.into_iter().enumerate().filter(|(at, _)| !flag(at + 2)).map(|(_, name)| name).collect();
    let tables = session
        .query(
            // Columns and filters are shown from PostgreSQL 15 on.
            &format!(
                "SELECT schemaname, tablename, to_jsonb(t) ->> 'attnames', to_jsonb(t) ->> 'rowfilter' \
                 FROM pg_publication_tables t WHERE pubname = {}",
                literal(name)
            ),
            DEADLINE,
        )
        .await?;
    let published = |row: Vec<Option<String>>| -> Option<Published> {
        let mut row = row.into_iter();
        let (schema, name, columns) = (row.next()??, row.next()??, row.next()?);
        let columns = columns.and_then(|columns| serde_json::from_str(&columns).ok());
        Some(Published { schema, name, columns, filter: row.next()? })
    };
    let tables = tables.into_iter().filter_map(published).collect();
    Ok(Some(Publication { all_tables: flag(0), via_root: flag(1), owned: flag(6), missing_operations, tables }))
}

/// What has to be run for `wanted` to be published; empty when all is well.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    pub sql: Vec<String>,
    /// Tables that were not published before.
    pub added: Vec<String>,
    pub creates: bool,
}

/// How a publication is to be made.
#[derive(Clone, Debug)]
pub struct Wish<'a> {
    pub name: &'a str,
    pub autocreate: Autocreate,
    pub via_root: bool,
    /// Tables with rows that are asked for (no partitioned ones), or the roots where `via_root`.
    pub tables: &'a [CatalogTable],
    /// Partitioned tables that are asked for by name, so that partitions made later are published too.
    pub parents: &'a [CatalogTable],
    /// `server_version_num`
    pub server: u32,
}

pub fn changes(found: Option<&Publication>, wish: &Wish<'_>) -> Result<Changes, PostgresError> {
    let name = identifier(wish.name);
    let list = |tables: &mut dyn Iterator<Item = &CatalogTable>| -> String {
        tables.map(|table| qualified(&table.schema, &table.name)).collect::<Vec<_>>().join(", ")
    };
    let Some(found) = found else {
        let mut with = vec!["publish = 'insert, update, delete, truncate'"];
        if wish.via_root {
            with.push("publish_via_partition_root = true");
        }
        if wish.server >= 180_000 {
            with.push("publish_generated_columns = stored");
        }
        let of = match wish.autocreate {
            Autocreate::AllTables => "ALL TABLES".to_owned(),
            Autocreate::Filtered if wish.tables.is_empty() && wish.parents.is_empty() => {
                return Err(PostgresError::Refused(
                    "no table matches the include and exclude lists, so there is nothing to publish; \
                     hint: entries are regular expressions on the whole name, as in public\\.orders"
                        .into(),
                ));
            }
            // A partition is published with its parent: naming both would only be noise.
            Autocreate::Filtered => {
                let alone = wish.tables.iter().filter(|table| {
                    !table.ancestors.iter().any(|(schema, name)| {
                        wish.parents.iter().any(|parent| parent.schema == *schema && parent.name == *name)
                    })
                });
                let top = wish.parents.iter().filter(|parent| {
                    !parent.ancestors.iter().any(|(schema, name)| {
                        wish.parents.iter().any(|other| other.schema == *schema && other.name == *name)
                    })
                });
                format!("TABLE {}", list(&mut alone.chain(top)))
            }
            Autocreate::Disabled => {
                return Err(PostgresError::Refused(format!(
                    "publication '{}' is missing, and publication.autocreate.mode is 'disabled'; \
                     hint: CREATE PUBLICATION {name} FOR TABLE …",
                    wish.name
                )));
            }
        };
        let sql = format!("CREATE PUBLICATION {name} FOR {of} WITH ({})", with.join(", "));
        let added = wish.tables.iter().map(CatalogTable::full_name).collect();
        return Ok(Changes { sql: vec![sql], added, creates: true });
    };
    if let Some(wrong) = found.wrong(wish.name, wish.via_root) {
        return Err(PostgresError::Refused(wrong));
    }
    let missing: Vec<&CatalogTable> =
        wish.tables.iter().filter(|table| !found.has(&table.schema, &table.name)).collect();
    if missing.is_empty() {
        return Ok(Changes::default());
    }
    let added: Vec<String> = missing.iter().map(|table| table.full_name()).collect();
    if wish.autocreate == Autocreate::Disabled {
        return Err(PostgresError::Refused(format!(
            "publication '{}' leaves out {}; hint: ALTER PUBLICATION {name} ADD TABLE {}",
            wish.name,
            added.join(", "),
            list(&mut missing.into_iter())
        )));
    }
    let sql = vec![format!("ALTER PUBLICATION {name} ADD TABLE {}", list(&mut missing.into_iter()))];
    Ok(Changes { sql, added, creates: false })
}

pub async fn apply(session: &mut Session, changes: &Changes) -> Result<(), PostgresError> {
    for sql in &changes.sql {
        session.query(sql, DEADLINE).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Oid, ReplicaIdentity};

    fn table(name: &str, ancestors: &[&str]) -> CatalogTable {
        CatalogTable {
            oid: Oid(1),
            schema: "s".into(),
            name: name.into(),
            partitioned: false,
            ancestors: ancestors.iter().map(|name| ("s".to_owned(), (*name).to_owned())).collect(),
            replica_identity: ReplicaIdentity::Default,
            has_primary_key: true,
            estimated_rows: 0,
            readable: true,
            rows_hidden: false,
            owned: true,
        }
    }

    #[test]
    fn only_what_is_asked_for_is_published_and_a_partition_through_its_parent() {
        let tables = [table("a", &[]), table("p1", &["p"])];
        let parents = [table("p", &[])];
        let mut wish = Wish {
            name: "pub",
            autocreate: Autocreate::Filtered,
            via_root: false,
            tables: &tables,
            parents: &parents,
            server: 150_000,
        };
        let made = changes(None, &wish).unwrap();
        assert_eq!(
            made.sql,
            [
                r#"CREATE PUBLICATION "pub" FOR TABLE "s"."a", "s"."p" WITH (publish = 'insert, update, delete, truncate')"#
            ]
        );
        let found = Publication {
            all_tables: false,
            via_root: false,
            owned: true,
            missing_operations: vec![],
            tables: vec![Published { schema: "s".into(), name: "p1".into(), ..Published::default() }],
        };
        assert_eq!(changes(Some(&found), &wish).unwrap().sql, [r#"ALTER PUBLICATION "pub" ADD TABLE "s"."a""#]);
        wish.autocreate = Autocreate::Disabled;
        assert!(changes(Some(&found), &wish).unwrap_err().to_string().contains("s.a"));
        assert!(changes(None, &wish).is_err());
    }
}
