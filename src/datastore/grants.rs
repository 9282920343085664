//! What the role may not do with a table that a connector writes: told before the first record fails on it.

use deadpool_postgres::GenericClient;

use super::migrations::Missing;
use super::rows::quote;
use super::{DatastoreError, TableName};

/// Which of `wanted` (`SELECT`, `INSERT`, `UPDATE`) the role lacks on the table, rights on its schema and on the
/// sequences of its columns included. `None`: nothing, or there is no such table.
pub async fn missing_grants<C: GenericClient>(
    client: &C,
    table: &TableName,
    wanted: &[&str],
) -> Result<Option<Missing>, DatastoreError> {
    let row = client
        .query_opt(
            "SELECT current_user::text, has_schema_privilege(n.oid, 'USAGE'), \
             ARRAY(SELECT p FROM unnest($3::text[]) p WHERE NOT has_table_privilege(c.oid, p)), \
             ARRAY(SELECT format('%I.%I', m.nspname, s.relname) FROM pg_depend d \
                 JOIN pg_class s ON s.oid = d.objid AND s.relkind = 'S' JOIN pg_namespace m ON m.oid = s.relnamespace \
                 WHERE d.classid = 'pg_class'::regclass AND d.refobjid = c.oid AND d.deptype = 'a' \
                 AND 'INSERT' = ANY($3) \
                 AND CASE WHEN s.relkind = 'S' THEN NOT has_sequence_privilege(s.oid, 'USAGE') ELSE false END) \
             FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relname = $2",
            &[&table.schema, &table.name, &wanted],
        )
        .await?;
    let Some(row) = row else { return Ok(None) };
    let (user, uses_schema): (String, bool) = (row.get(0), row.get(1));
    let (rights, sequences): (Vec<String>, Vec<String>) = (row.get(2), row.get(3));
    let (role, schema) = (quote(&user), quote(&table.schema));
    let mut sql = Vec::new();
    let mut lacks = Vec::new();
    if !uses_schema {
        sql.push(format!("GRANT USAGE ON SCHEMA {schema} TO {role};"));
        lacks.push(format!("use schema {}", table.schema));
    }
    if !rights.is_empty() {
        sql.push(format!("GRANT {} ON {} TO {role};", rights.join(", "), table.quoted()));
        lacks.push(format!("{} {table}", rights.join(", ")));
    }
    if !sequences.is_empty() {
        sql.push(format!("GRANT USAGE ON SEQUENCE {} TO {role};", sequences.join(", ")));
        lacks.push(format!("use sequence {}", sequences.join(", ")));
    }
    let problem = format!("role '{user}' may not {}", lacks.join(", nor "));
    Ok((!sql.is_empty()).then_some(Missing { problem, sql }))
}
