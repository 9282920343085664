//! Which tables are asked for: Debezium's include and exclude lists, regular expressions that must match the whole
//! name, whatever its case.

use regex::{Regex, RegexBuilder};

use crate::event::OWN_SCHEMA;

use super::catalog::CatalogTable;

/// Lists that are empty do not decide.
#[derive(Clone, Debug, Default)]
pub struct TableFilter {
    pub schema_include: Vec<Regex>,
    pub schema_exclude: Vec<Regex>,
    /// Against `schema.table`.
    pub table_include: Vec<Regex>,
    pub table_exclude: Vec<Regex>,
}

/// One entry of a list; the error is the expression's own.
pub fn pattern(text: &str) -> Result<Regex, regex::Error> {
    RegexBuilder::new(&format!("^(?:{})$", text.trim())).case_insensitive(true).build()
}

fn any(list: &[Regex], name: &str) -> bool {
    list.iter().any(|pattern| pattern.is_match(name))
}

impl TableFilter {
    pub fn wants(&self, schema: &str, table: &str) -> bool {
        if schema == OWN_SCHEMA || schema == "pg_catalog" || schema == "information_schema" {
            return false;
        }
        let full = format!("{schema}.{table}");
        (self.schema_include.is_empty() || any(&self.schema_include, schema))
            && !any(&self.schema_exclude, schema)
            && (self.table_include.is_empty() || any(&self.table_include, &full))
            && !any(&self.table_exclude, &full)
    }

    /// Named to be left out, or one of Tidegate's or the server's own.
    pub fn excludes(&self, schema: &str, table: &str) -> bool {
        schema == OWN_SCHEMA
            || schema == "pg_catalog"
            || schema == "information_schema"
            || any(&self.schema_exclude, schema)
            || any(&self.table_exclude, &format!("{schema}.{table}"))
    }

    /// Wanted by its own name, or as part of a partitioned table that is; its own exclusion counts.
    pub fn wants_table(&self, table: &CatalogTable) -> bool {
        if self.wants(&table.schema, &table.name) {
            return true;
        }
        let full = format!("{}.{}", table.schema, table.name);
        !any(&self.table_exclude, &full)
            && !any(&self.schema_exclude, &table.schema)
            && table.ancestors.iter().any(|(schema, name)| self.wants(schema, name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_names_and_own_tables_are_never_wanted() {
        let filter = TableFilter {
            table_include: vec![pattern(r"public\.orders").unwrap(), pattern(r"g\.t_.*").unwrap()],
            table_exclude: vec![pattern(r"g\.t_secret").unwrap()],
            ..TableFilter::default()
        };
        assert!(filter.wants("public", "orders") && filter.wants("g", "t_int"));
        assert!(!filter.wants("public", "orders_old") && !filter.wants("g", "t_secret"));
        assert!(!TableFilter::default().wants("tidegate", "links"));
        assert!(TableFilter::default().wants("public", "anything"));
    }
}
