-- Version 1 of Tidegate's own tables. Run by the worker, or by a DBA where the worker's role may not create them.
CREATE TABLE tidegate.links (
    system         text NOT NULL,
    object         text NOT NULL,
    table_name     text NOT NULL,
    local_key      jsonb NOT NULL CHECK (jsonb_typeof(local_key) = 'object'),
    -- The one value of a key of one column, as text, numbers without zeros at their end: what link("object"; 7) asks by.
    key_text       text GENERATED ALWAYS AS (CASE WHEN jsonb_array_length(jsonb_path_query_array(local_key, '$.*')) = 1
                       THEN CASE jsonb_typeof(jsonb_path_query_array(local_key, '$.*') -> 0) WHEN 'number'
                           THEN trim_scale((jsonb_path_query_array(local_key, '$.*') -> 0)::numeric)::text
                           ELSE jsonb_path_query_array(local_key, '$.*') ->> 0 END END) STORED,
    external_id    text,
    external_json  json,
    base_doc       json,
    base_remote    json,
    remote_version text,
    kept           json,
    intent         json,
    -- Links that were not there when base_doc was sent, [[object, key], …]: what link_later("object"; key) gave null for.
    owed           json,
    sent           json,
    step           int NOT NULL DEFAULT 0,
    pushed_seq     bigint NOT NULL DEFAULT 0,
    -- How it went back and forth, as twoway::Turns has it.
    turns          json,
    generation     bigint NOT NULL DEFAULT 1,
    deleted        boolean NOT NULL DEFAULT false,
    created_at     timestamptz NOT NULL DEFAULT now(),
    updated_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (system, object, local_key)
);
CREATE UNIQUE INDEX links_external ON tidegate.links (system, object, external_id) WHERE external_id IS NOT NULL;
CREATE INDEX links_key_text ON tidegate.links (system, object, key_text);
CREATE TABLE tidegate.parked (
    seq          bigserial NOT NULL UNIQUE,
    connector    text NOT NULL,
    topic        text NOT NULL,
    "partition"  int NOT NULL,
    "offset"     bigint NOT NULL,
    key          jsonb NOT NULL,
    kind         text NOT NULL CHECK (kind IN ('rejected', 'waiting', 'behind', 'owing')),
    waits_system text,
    waits_object text,
    waits_key    jsonb,
    reason       text NOT NULL,
    request      json,
    response     json,
    attempts     int NOT NULL DEFAULT 1,
    parked_at    timestamptz NOT NULL DEFAULT now(),
    deadline     timestamptz,
    -- Of a record that was rejected: whether it may be tried again when its row has changed.
    heals        boolean NOT NULL DEFAULT false,
    tried_at     timestamptz NOT NULL DEFAULT now(),
    retry_at     timestamptz,
    command      text CHECK (command IN ('replay', 'drop')),
    record_key   bytea,
    record_value bytea,
    headers      json,
    PRIMARY KEY (connector, topic, "partition", "offset", key)
);
CREATE INDEX parked_queue ON tidegate.parked (connector, key, seq);
CREATE INDEX parked_command ON tidegate.parked (connector) WHERE command IS NOT NULL;
-- Which document a line was last delivered in: a deleted line's event has only the line's own key.
CREATE TABLE tidegate.document_lines (
    system     text NOT NULL,
    object     text NOT NULL,
    table_name text NOT NULL,
    line_key   jsonb NOT NULL,
    root_key   jsonb NOT NULL,
    PRIMARY KEY (system, object, table_name, line_key)
);
CREATE INDEX document_lines_root ON tidegate.document_lines (system, object, root_key);
CREATE TABLE tidegate.cursors (
    connector  text PRIMARY KEY,
    cursor     json,
    generation bigint NOT NULL DEFAULT 1,
    updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE tidegate.held (
    connector   text NOT NULL,
    system      text NOT NULL,
    object      text NOT NULL,
    external_id text NOT NULL,
    record      json NOT NULL,
    reason      text NOT NULL,
    push_seq    bigint NOT NULL DEFAULT 0,
    cursor      json,
    attempts    int NOT NULL DEFAULT 1,
    behind      boolean NOT NULL DEFAULT false,
    listed_at   timestamptz NOT NULL DEFAULT now(),
    held_at     timestamptz NOT NULL DEFAULT now(),
    retry_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (connector, object, external_id)
);
CREATE INDEX held_retry ON tidegate.held (connector, retry_at);
CREATE TABLE tidegate.leases (
    name       text PRIMARY KEY,
    owner      text NOT NULL,
    generation bigint NOT NULL DEFAULT 1,
    expires_at timestamptz NOT NULL
);
CREATE INDEX leases_owner ON tidegate.leases (owner);
-- What this database was when it was last looked at, and where its WAL stood when it was found to be another.
CREATE TABLE tidegate.history (
    one          boolean PRIMARY KEY DEFAULT true CHECK (one),
    cluster      text NOT NULL,
    timeline     text NOT NULL,
    links        bigint NOT NULL,
    restored_lsn pg_lsn
);
CREATE SEQUENCE tidegate.push_seq;
