"""The first tables, as they were on the first day. Frozen: later changes are later revisions.

Written as SQL and not through the models, which move on. The triggers make `preference` append-only for every
program that opens the file, not only for this one.
"""

from alembic import op

revision = "0001"
down_revision = None

TABLES = """
CREATE TABLE annotator (
    id INTEGER NOT NULL,
    name VARCHAR NOT NULL,
    kind VARCHAR NOT NULL,
    created_at FLOAT NOT NULL,
    PRIMARY KEY (id),
    CONSTRAINT ck_kind CHECK (kind IN ('human', 'simulated')),
    UNIQUE (name)
);

CREATE TABLE prompt (
    id INTEGER NOT NULL,
    text VARCHAR NOT NULL,
    "key" VARCHAR NOT NULL,
    PRIMARY KEY (id),
    UNIQUE (text)
);
CREATE INDEX ix_prompt_key ON prompt ("key");

CREATE TABLE setting (
    "key" VARCHAR NOT NULL,
    value JSON,
    PRIMARY KEY ("key")
);

CREATE TABLE study (
    id INTEGER NOT NULL,
    name VARCHAR NOT NULL,
    base VARCHAR NOT NULL,
    question VARCHAR NOT NULL,
    salt VARCHAR NOT NULL,
    settings JSON NOT NULL,
    created_at FLOAT NOT NULL,
    PRIMARY KEY (id),
    UNIQUE (name)
);

CREATE TABLE comparison (
    id INTEGER NOT NULL,
    study_id INTEGER NOT NULL,
    policy_a JSON NOT NULL,
    policy_b JSON NOT NULL,
    "plan" JSON NOT NULL,
    state VARCHAR NOT NULL,
    seed INTEGER NOT NULL,
    result JSON,
    created_at FLOAT NOT NULL,
    completed_at FLOAT,
    PRIMARY KEY (id),
    CONSTRAINT ck_state CHECK (state IN ('preparing', 'voting', 'complete', 'abandoned')),
    FOREIGN KEY(study_id) REFERENCES study (id)
);
CREATE INDEX ix_comparison_study_id ON comparison (study_id);

CREATE TABLE job (
    id VARCHAR NOT NULL,
    kind VARCHAR NOT NULL,
    lane VARCHAR NOT NULL,
    state VARCHAR NOT NULL,
    config JSON NOT NULL,
    study_id INTEGER,
    run_dir VARCHAR,
    supersedes VARCHAR,
    priority INTEGER NOT NULL,
    created_at FLOAT NOT NULL,
    started_at FLOAT,
    finished_at FLOAT,
    heartbeat FLOAT,
    pid INTEGER,
    pid_started FLOAT,
    worker VARCHAR,
    progress FLOAT,
    message VARCHAR,
    error VARCHAR,
    result JSON,
    PRIMARY KEY (id),
    CONSTRAINT ck_lane CHECK (lane IN ('interactive', 'training', 'data')),
    CONSTRAINT ck_state CHECK (state IN ('queued', 'running', 'stopping', 'stopped', 'done', 'failed', 'cancelled')),
    FOREIGN KEY(study_id) REFERENCES study (id) ON DELETE SET NULL
);
CREATE INDEX ix_job_queue ON job (lane, state);
CREATE INDEX ix_job_study_id ON job (study_id);
CREATE INDEX ix_job_supersedes ON job (supersedes);

CREATE TABLE picture (
    id INTEGER NOT NULL,
    hash VARCHAR NOT NULL,
    width INTEGER NOT NULL,
    height INTEGER NOT NULL,
    prompt_id INTEGER,
    provenance JSON NOT NULL,
    created_at FLOAT NOT NULL,
    PRIMARY KEY (id),
    FOREIGN KEY(prompt_id) REFERENCES prompt (id)
);
CREATE INDEX ix_picture_hash ON picture (hash);
CREATE INDEX ix_picture_prompt_id ON picture (prompt_id);

CREATE TABLE study_prompt (
    study_id INTEGER NOT NULL,
    prompt_id INTEGER NOT NULL,
    split VARCHAR NOT NULL,
    PRIMARY KEY (study_id, prompt_id),
    CONSTRAINT ck_split CHECK (split IN ('train', 'heldout')),
    FOREIGN KEY(study_id) REFERENCES study (id),
    FOREIGN KEY(prompt_id) REFERENCES prompt (id)
);

CREATE TABLE checkpoint (
    id INTEGER NOT NULL,
    kind VARCHAR NOT NULL,
    name VARCHAR NOT NULL,
    path VARCHAR NOT NULL,
    parent_id INTEGER,
    study_id INTEGER,
    job_id VARCHAR,
    step INTEGER,
    meta JSON NOT NULL,
    created_at FLOAT NOT NULL,
    hidden BOOLEAN NOT NULL,
    PRIMARY KEY (id),
    CONSTRAINT ck_kind CHECK (kind IN ('base', 'adapter', 'lrm')),
    UNIQUE (path),
    FOREIGN KEY(parent_id) REFERENCES checkpoint (id) ON DELETE SET NULL,
    FOREIGN KEY(study_id) REFERENCES study (id) ON DELETE SET NULL,
    FOREIGN KEY(job_id) REFERENCES job (id) ON DELETE SET NULL
);
CREATE INDEX ix_checkpoint_job_id ON checkpoint (job_id);
CREATE INDEX ix_checkpoint_parent_id ON checkpoint (parent_id);
CREATE INDEX ix_checkpoint_study_id ON checkpoint (study_id);

CREATE TABLE pair (
    id INTEGER NOT NULL,
    prompt_id INTEGER NOT NULL,
    first_id INTEGER NOT NULL,
    second_id INTEGER NOT NULL,
    origin VARCHAR NOT NULL,
    "key" VARCHAR NOT NULL,
    created_at FLOAT NOT NULL,
    PRIMARY KEY (id),
    FOREIGN KEY(prompt_id) REFERENCES prompt (id),
    FOREIGN KEY(first_id) REFERENCES picture (id),
    FOREIGN KEY(second_id) REFERENCES picture (id)
);
CREATE INDEX ix_pair_first_id ON pair (first_id);
CREATE INDEX ix_pair_key ON pair ("key");
CREATE INDEX ix_pair_prompt_id ON pair (prompt_id);
CREATE INDEX ix_pair_second_id ON pair (second_id);
CREATE UNIQUE INDEX uq_pair_key ON pair ("key") WHERE origin != 'comparison';

CREATE TABLE trace (
    id INTEGER NOT NULL,
    "key" VARCHAR NOT NULL,
    path VARCHAR NOT NULL,
    bytes INTEGER NOT NULL,
    prompt VARCHAR NOT NULL,
    seed INTEGER NOT NULL,
    policy JSON NOT NULL,
    config JSON NOT NULL,
    study_id INTEGER,
    job_id VARCHAR,
    created_at FLOAT NOT NULL,
    used_at FLOAT NOT NULL,
    PRIMARY KEY (id),
    UNIQUE ("key"),
    FOREIGN KEY(study_id) REFERENCES study (id) ON DELETE SET NULL,
    FOREIGN KEY(job_id) REFERENCES job (id) ON DELETE SET NULL
);
CREATE INDEX ix_trace_job_id ON trace (job_id);
CREATE INDEX ix_trace_study_id ON trace (study_id);
CREATE INDEX ix_trace_used_at ON trace (used_at);

CREATE TABLE comparison_pair (
    comparison_id INTEGER NOT NULL,
    pair_id INTEGER NOT NULL,
    a_is VARCHAR NOT NULL,
    seed INTEGER NOT NULL,
    position INTEGER NOT NULL,
    PRIMARY KEY (comparison_id, pair_id),
    CONSTRAINT ck_a_is CHECK (a_is IN ('first', 'second')),
    FOREIGN KEY(comparison_id) REFERENCES comparison (id),
    UNIQUE (pair_id),
    FOREIGN KEY(pair_id) REFERENCES pair (id)
);

CREATE TABLE preference (
    id INTEGER NOT NULL,
    study_id INTEGER NOT NULL,
    pair_id INTEGER NOT NULL,
    annotator_id INTEGER NOT NULL,
    choice VARCHAR,
    "left" VARCHAR,
    milliseconds INTEGER,
    created_at FLOAT NOT NULL,
    client_key VARCHAR NOT NULL,
    revokes INTEGER,
    simulated BOOLEAN NOT NULL,
    repeat BOOLEAN NOT NULL,
    comparison_id INTEGER,
    PRIMARY KEY (id),
    CONSTRAINT ck_choice CHECK (choice IS NULL OR choice IN ('first', 'second', 'tie', 'both_bad', 'skip')),
    CONSTRAINT ck_left CHECK ("left" IS NULL OR "left" IN ('first', 'second')),
    CONSTRAINT ck_says_something CHECK (choice IS NOT NULL OR revokes IS NOT NULL),
    FOREIGN KEY(study_id) REFERENCES study (id),
    FOREIGN KEY(pair_id) REFERENCES pair (id),
    FOREIGN KEY(annotator_id) REFERENCES annotator (id),
    UNIQUE (client_key),
    UNIQUE (revokes),
    FOREIGN KEY(revokes) REFERENCES preference (id),
    FOREIGN KEY(comparison_id) REFERENCES comparison (id)
);
CREATE INDEX ix_preference_annotator_id ON preference (annotator_id);
CREATE INDEX ix_preference_answers ON preference (study_id, annotator_id, pair_id, choice);
CREATE INDEX ix_preference_comparison_id ON preference (comparison_id);
CREATE INDEX ix_preference_pair ON preference (study_id, pair_id);
CREATE INDEX ix_preference_pair_id ON preference (pair_id);
CREATE INDEX ix_preference_time ON preference (study_id, annotator_id, created_at);
CREATE INDEX ix_preference_undo ON preference (study_id, annotator_id, id) WHERE revokes IS NOT NULL;

CREATE TABLE study_pair (
    study_id INTEGER NOT NULL,
    pair_id INTEGER NOT NULL,
    position INTEGER NOT NULL,
    repeat BOOLEAN NOT NULL,
    PRIMARY KEY (study_id, pair_id),
    FOREIGN KEY(study_id) REFERENCES study (id),
    FOREIGN KEY(pair_id) REFERENCES pair (id)
);
CREATE INDEX ix_study_pair_pair_id ON study_pair (pair_id);
CREATE UNIQUE INDEX ix_study_pair_queue ON study_pair (study_id, position, pair_id);
CREATE INDEX ix_study_pair_repeat ON study_pair (study_id, pair_id) WHERE repeat;

CREATE TABLE trace_score (
    id INTEGER NOT NULL,
    trace_id INTEGER NOT NULL,
    lrm VARCHAR NOT NULL,
    scores JSON NOT NULL,
    created_at FLOAT NOT NULL,
    PRIMARY KEY (id),
    UNIQUE (trace_id, lrm),
    FOREIGN KEY(trace_id) REFERENCES trace (id) ON DELETE CASCADE
);
CREATE INDEX ix_trace_score_trace_id ON trace_score (trace_id);
"""

TRIGGERS = (
    """CREATE TRIGGER preference_never_changes BEFORE UPDATE ON preference
    BEGIN SELECT RAISE(ABORT, 'a label never changes: add a row that revokes it'); END""",
    """CREATE TRIGGER preference_never_goes BEFORE DELETE ON preference
    BEGIN SELECT RAISE(ABORT, 'a label is never deleted: add a row that revokes it'); END""",
    # INSERT OR REPLACE deletes without firing the trigger above
    """CREATE TRIGGER preference_never_replaced BEFORE INSERT ON preference
    WHEN EXISTS (SELECT 1 FROM preference
        WHERE id = NEW.id OR client_key = NEW.client_key OR revokes = NEW.revokes)
    BEGIN SELECT RAISE(ABORT, 'UNIQUE: this label, its client key or what it revokes is there already'); END""",
)


def upgrade() -> None:
    for statement in (*TABLES.strip().split(";\n"), *TRIGGERS):
        op.execute(statement)
