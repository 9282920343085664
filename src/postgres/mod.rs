//! What Tidegate speaks with PostgreSQL below SQL: the replication protocol, pgoutput, slots, snapshots.
