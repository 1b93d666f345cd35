"""Imports remember their rows, so that they go on where they were killed and score gaps can be joined by row; filters
say which imported labels train."""

from alembic import op

revision = "0003"
down_revision = "0002"

TABLES = """
CREATE TABLE import (
    id INTEGER NOT NULL,
    study_id INTEGER NOT NULL,
    source VARCHAR NOT NULL,
    name VARCHAR NOT NULL,
    kind VARCHAR NOT NULL,
    state JSON NOT NULL,
    created_at FLOAT NOT NULL,
    finished_at FLOAT,
    PRIMARY KEY (id),
    FOREIGN KEY(study_id) REFERENCES study (id)
);
CREATE INDEX ix_import_source ON import (study_id, source);

CREATE TABLE import_row (
    import_id INTEGER NOT NULL,
    "row" INTEGER NOT NULL,
    preference_id INTEGER,
    reason VARCHAR,
    PRIMARY KEY (import_id, "row"),
    FOREIGN KEY(import_id) REFERENCES import (id),
    FOREIGN KEY(preference_id) REFERENCES preference (id)
);

CREATE TABLE gap_set (
    id INTEGER NOT NULL,
    study_id INTEGER NOT NULL,
    import_id INTEGER,
    name VARCHAR NOT NULL,
    config JSON NOT NULL,
    created_at FLOAT NOT NULL,
    finished_at FLOAT,
    PRIMARY KEY (id),
    FOREIGN KEY(study_id) REFERENCES study (id),
    FOREIGN KEY(import_id) REFERENCES import (id)
);
CREATE INDEX ix_gap_set_import_id ON gap_set (import_id);
CREATE INDEX ix_gap_set_study_id ON gap_set (study_id);

CREATE TABLE gap (
    gap_set_id INTEGER NOT NULL,
    preference_id INTEGER NOT NULL,
    tie BOOLEAN NOT NULL,
    aesthetic FLOAT,
    clip FLOAT,
    vqa FLOAT,
    pick FLOAT,
    PRIMARY KEY (gap_set_id, preference_id),
    FOREIGN KEY(gap_set_id) REFERENCES gap_set (id) ON DELETE CASCADE,
    FOREIGN KEY(preference_id) REFERENCES preference (id)
);

CREATE TABLE label_filter (
    id INTEGER NOT NULL,
    study_id INTEGER NOT NULL,
    gap_set_id INTEGER NOT NULL,
    name VARCHAR NOT NULL,
    rule JSON NOT NULL,
    kept INTEGER NOT NULL,
    dropped INTEGER NOT NULL,
    created_at FLOAT NOT NULL,
    removed_at FLOAT,
    PRIMARY KEY (id),
    FOREIGN KEY(study_id) REFERENCES study (id),
    FOREIGN KEY(gap_set_id) REFERENCES gap_set (id)
);
CREATE INDEX ix_label_filter_gap_set_id ON label_filter (gap_set_id);
CREATE INDEX ix_label_filter_study_id ON label_filter (study_id);
CREATE UNIQUE INDEX uq_label_filter_on ON label_filter (study_id) WHERE removed_at IS NULL;

CREATE TABLE filter_drop (
    filter_id INTEGER NOT NULL,
    preference_id INTEGER NOT NULL,
    PRIMARY KEY (filter_id, preference_id),
    FOREIGN KEY(filter_id) REFERENCES label_filter (id),
    FOREIGN KEY(preference_id) REFERENCES preference (id)
);
"""


def upgrade() -> None:
    for statement in TABLES.strip().split(";\n"):
        op.execute(statement)
