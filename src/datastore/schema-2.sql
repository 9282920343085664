-- Version 2: what was sent since a record was last seen; held records that are older than what is known.
ALTER TABLE tidegate.links ADD COLUMN sent json;
ALTER TABLE tidegate.held
    ADD COLUMN behind boolean NOT NULL DEFAULT false,
    ADD COLUMN listed_at timestamptz NOT NULL DEFAULT now();
