//! Avro: schemas as Debezium writes them, the plan compiled per relation, decoding.
