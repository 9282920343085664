//! Where events differ from Debezium's on purpose, each with its reason. The documentation prints this list, and
//! the golden tests hold it: a difference that is not here fails them, and so does an entry that is none any more.

/// One difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deviation {
    pub what: &'static str,
    pub why: &'static str,
}

/// Every difference, in no order.
pub const DEVIATIONS: &[Deviation] = &[
    Deviation {
        what: "NULL in a nullable column that has a default is null",
        why: "Debezium's converter shows the default instead, so a NULL cannot be told from the default",
    },
    Deviation {
        what: "a snapshot row is the same as the streamed one: dates before 1582-10-15 and BC, infinite dates, \
               columns of type name",
        why: "Debezium reads snapshots through another driver and calendar than the stream",
    },
    Deviation {
        what: "stored generated columns are in no event unless the stream carries them (PostgreSQL 18 and a publication that publishes them)",
        why: "a column that is there only in snapshots \
              changes the schema back and forth",
    },
    Deviation {
        what: "numeric with a negative scale has scale 0 and as many more digits; one with a scale beyond its \
               precision has the scale as precision",
        why: "Avro wants 0 <= scale <= precision; Debezium writes a scale of 2046",
    },
    Deviation {
        what: "a multidimensional array is its elements in one list, row by row",
        why: "a column's type does not say how many dimensions its values have; Debezium writes nulls",
    },
    Deviation {
        what: "an unchanged TOAST array of booleans, money, points, lines or circles has the placeholder's bits or \
               bytes as elements, as arrays of numbers have its bytes",
        why: "a null would be taken for the value",
    },
    Deviation {
        what: "types that Debezium leaves out (tsquery, pg_lsn, xid, pg_snapshot, composites, regclass, multiranges, \
               jsonpath and any other) are strings: PostgreSQL's text",
        why: "a column that silently is not there is lost data",
    },
    Deviation {
        what: "names that Avro forbids are adjusted (what is not a letter, digit or _ becomes _), and the user is told",
        why: "Debezium's task dies of them and no table is delivered any more",
    },
    Deviation {
        what: "a default that cannot stand in a schema (infinite, or to be computed) is left out",
        why: "Debezium's task dies of 'Infinity', and takes the first quoted part of an expression for its value",
    },
    Deviation {
        what: "source.sequence of the first streamed transaction has the consistent point as its first part",
        why: "every event then has a version that rises with commits; Debezium's first one has null",
    },
    Deviation {
        what: "source.version is Tidegate's, source.origin the name of the system that the transaction was tagged with",
        why: "a consumer can tell who wrote an event, and whose data it carries",
    },
];

#[cfg(test)]
mod tests {
    #[test]
    fn the_documentation_lists_them_all() {
        let page = include_str!("../../docs/debezium-differences.md");
        let listed = page.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| Tidegate")).count();
        assert_eq!(listed, super::DEVIATIONS.len());
        for deviation in super::DEVIATIONS {
            let line = format!("| {} | {} |", deviation.what, deviation.why);
            assert!(page.contains(&line), "{line}");
        }
    }
}
