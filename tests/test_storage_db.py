"""The database file: durability settings, migrations from every past, labels that never change, kill -9."""

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlmodel import SQLModel
from storage_lab import add_rows, answer

import storage
from storage import StorageError, data_models, labels
from storage.db import DATABASE, migrate, scripts

ROOT = Path(__file__).resolve().parent.parent
REVISIONS = [script.revision for script in reversed(list(scripts().walk_revisions()))]

# one row in every new table of each revision, as that revision had it; later revisions must carry all of this along
POPULATE = {
    "0001": """
INSERT INTO annotator VALUES (1, 'anna', 'human', 1.0), (2, 'judge', 'simulated', 1.0);
INSERT INTO prompt VALUES (1, 'A red circle.', 'a red circle');
INSERT INTO study VALUES (1, 'Old', 'scenes', 'Which?', 'scenes', '{"a": 1}', 2.0);
INSERT INTO study_prompt VALUES (1, 1, 'train');
INSERT INTO picture VALUES (1, 'aa', 64, 64, 1, '{"seed": 0}', 2.0), (2, 'bb', 64, 64, 1, '{"seed": 1}', 2.0);
INSERT INTO pair VALUES (1, 1, 1, 2, 'queue', 'k', 2.0);
INSERT INTO study_pair VALUES (1, 1, 0, 0);
INSERT INTO comparison (id, study_id, policy_a, policy_b, plan, state, seed, created_at)
    VALUES (1, 1, '{}', '{}', '{"votes": 1}', 'abandoned', 5, 2.0);
INSERT INTO comparison_pair VALUES (1, 1, 'second', 7, 0);
INSERT INTO preference VALUES (1, 1, 1, 1, 'first', 'second', 800, 3.0, 'c1', NULL, 0, 0, NULL);
INSERT INTO preference VALUES (2, 1, 1, 1, NULL, NULL, NULL, 4.0, 'c2', 1, 0, 0, NULL);
INSERT INTO preference VALUES (3, 1, 1, 2, 'tie', 'first', 1, 5.0, 'c3', NULL, 1, 0, NULL);
INSERT INTO job (id, kind, lane, state, config, priority, created_at)
    VALUES ('j', 'pairs', 'interactive', 'done', '{}', 0, 2.0);
INSERT INTO checkpoint (id, kind, name, path, job_id, meta, created_at, hidden)
    VALUES (1, 'lrm', 'L', 'x', 'j', '{}', 2.0, 0);
INSERT INTO trace (id, key, path, bytes, prompt, seed, policy, config, created_at, used_at)
    VALUES (1, 't', 'p', 3, 'q', 0, '{}', '{}', 2.0, 2.0);
INSERT INTO trace_score (id, trace_id, lrm, scores, created_at) VALUES (1, 1, 'x', '[1.5]', 2.0);
INSERT INTO setting VALUES ('current_study', '1');
""",
    "0003": """
INSERT INTO import VALUES (1, 1, 'digest', 'train.parquet', 'parquet', '{"done": 2}', 6.0, NULL);
INSERT INTO import_row VALUES (1, 1, 3, NULL), (1, 2, NULL, 'the row has no caption');
INSERT INTO gap_set VALUES (1, 1, 1, 'scores.csv', '{}', 6.0, 7.0);
INSERT INTO gap VALUES (1, 3, 1, 0.1, NULL, 0.0, NULL);
INSERT INTO label_filter VALUES (1, 1, 1, 'MPCF rule 2', '{"format_version": 1}', 0, 1, 8.0, NULL);
INSERT INTO filter_drop VALUES (1, 3);
""",
}


def old_database(folder: Path, revision: str) -> None:
    """A populated database as the program of `revision` left it: filled revision by revision on the way there."""
    folder.mkdir(parents=True)
    engine = create_engine(f"sqlite:///{folder / DATABASE}")
    with engine.begin() as connection:
        for step in REVISIONS[: REVISIONS.index(revision) + 1]:
            migrate(connection, step)
            for statement in POPULATE.get(step, "").strip().split(";\n"):
                connection.exec_driver_sql(statement.rstrip(";"))
    engine.dispose()


def tables(connection) -> list[str]:
    found = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name != 'alembic_version'")
    return [name for (name,) in found]


def next_revision(tmp_path: Path, extra: str = "") -> Path:
    """The migrations with a made-up next revision that adds a column, and does `extra`."""
    migrations = tmp_path / "migrations"
    shutil.copytree(storage.db.MIGRATIONS, migrations)
    (migrations / "versions" / "9999_next.py").write_text(
        "from alembic import op\nrevision = '9999'\n"
        f"down_revision = {REVISIONS[-1]!r}\n"
        f"def upgrade():\n    op.execute('ALTER TABLE study ADD COLUMN note VARCHAR')\n{extra}"
    )
    return migrations


def test_settings_of_both_kinds_of_connection(store):
    for engine in (store.engine, store._reading):
        with engine.connect() as connection:
            wanted = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30000}
            for pragma, value in wanted.items():
                assert connection.exec_driver_sql(f"PRAGMA {pragma}").scalar() == value


@pytest.mark.parametrize("revision", REVISIONS)
def test_a_populated_database_of_every_revision_is_migrated(tmp_path, revision):
    old_database(tmp_path / "lab", revision)
    with closing(sqlite3.connect(tmp_path / "lab" / DATABASE)) as plain:
        rows = {name: plain.execute(f"SELECT COUNT(*) FROM {name}").fetchone()[0] for name in tables(plain)}  # noqa: S608
    opened = storage.open(tmp_path / "lab")
    found = labels.effective(opened, 1)
    assert [(row["annotator_id"], row["choice"], row["simulated"]) for row in found] == [(2, "tie", True)]
    assert labels.get_study(opened, 1).settings == {"a": 1}
    with opened.reader() as session:
        for table in SQLModel.metadata.tables:
            count = session.execute(text(f"SELECT COUNT(*) FROM {table}")).scalar()  # noqa: S608
            assert count == rows.get(table, 0) and (count or table not in rows), table
        assert session.execute(text("PRAGMA foreign_key_check")).all() == []
    opened.close()
    backups = list((tmp_path / "lab" / "backups").glob("*.sqlite"))
    assert len(backups) == (revision != REVISIONS[-1])


def test_a_backup_of_the_old_revision_is_made_before_a_migration(tmp_path, monkeypatch):
    """Of a made-up next revision, so that this is tested whatever the last one did."""
    old_database(tmp_path / "lab", REVISIONS[-1])
    monkeypatch.setattr(storage.db, "MIGRATIONS", next_revision(tmp_path))
    opened = storage.open(tmp_path / "lab")
    with opened.reader() as session:
        assert session.execute(text("SELECT note FROM study")).scalar() is None
    opened.close()
    (backup,) = (tmp_path / "lab" / "backups").glob("*.sqlite")
    with closing(sqlite3.connect(backup)) as copy:
        assert copy.execute("SELECT version_num FROM alembic_version").fetchone() == (REVISIONS[-1],)
        assert copy.execute("SELECT COUNT(*) FROM preference").fetchone() == (3,)
        assert "note" not in [row[1] for row in copy.execute("PRAGMA table_info(study)")]


def test_a_failing_migration_changes_nothing(tmp_path, monkeypatch):
    old_database(tmp_path / "lab", REVISIONS[-1])
    migrations = next_revision(tmp_path, "    op.execute('nonsense')\n")
    with monkeypatch.context() as patch:
        patch.setattr(storage.db, "MIGRATIONS", migrations)
        with pytest.raises(Exception, match="nonsense"):
            storage.open(tmp_path / "lab")
    opened = storage.open(tmp_path / "lab")
    assert len(labels.effective(opened, 1)) == 1
    opened.close()


def test_a_newer_database_is_refused_in_one_sentence(tmp_path):
    storage.open(tmp_path / "lab").close()
    with closing(sqlite3.connect(tmp_path / "lab" / DATABASE)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '2031_far'")
    with pytest.raises(StorageError, match=r"newer version .*2031_far.*; update Preference Lab") as refused:
        storage.open(tmp_path / "lab")
    assert "\n" not in str(refused.value)


def test_what_is_no_database_or_no_folder_is_refused(tmp_path):
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / DATABASE).write_text("hello, I am a letter and not a database at all " * 50)
    with pytest.raises(StorageError, match="is not a database"):
        storage.open(tmp_path / "lab")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Cannot use"):
        storage.open(tmp_path / "file")


def test_a_folder_with_odd_letters(tmp_path):
    opened = storage.open(tmp_path / "what? #1 & 100% übung")
    assert (tmp_path / "what? #1 & 100% übung" / DATABASE).stat().st_size > 0
    assert labels.list_studies(opened) == []
    opened.close()


def schema(connection) -> dict[str, str]:
    """Every table, index and trigger, without the spelling differences of quoting and spaces."""
    rows = connection.exec_driver_sql("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")
    return {name: re.sub(r"[\s\"]+", "", sql).lower() for name, sql in rows if name != "alembic_version"}


def test_migrations_build_exactly_what_the_models_say(store):
    engine = create_engine("sqlite://")
    with engine.connect() as wanted, store._reading.connect() as found:
        assert data_models.Import.__tablename__ in SQLModel.metadata.tables
        SQLModel.metadata.create_all(wanted)
        built = schema(found)
        triggers = {name for name in built if name.startswith("preference_never_")}
        assert len(triggers) == 3
        assert {name: sql for name, sql in built.items() if name not in triggers} == schema(wanted)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE preference SET choice = 'second'",
        "UPDATE preference SET id = id + 100",
        "DELETE FROM preference",
        "REPLACE INTO preference SELECT * FROM preference",
        "INSERT OR REPLACE INTO preference SELECT 99, study_id, pair_id, annotator_id, 'tie', \"left\", milliseconds, "
        "created_at, client_key, revokes, simulated, repeat, comparison_id FROM preference",
        "DELETE FROM annotator",
        "DELETE FROM pair",
        "DELETE FROM study",
    ],
)
def test_labels_refuse_to_change_also_for_other_programs(store, statement):
    study, who = labels.create_study(store, "S"), labels.annotator(store, "anna")
    (pair,) = add_rows(store, study, 1)
    answer(store, study, who, pair.id)
    before = labels.effective(store, study.id)
    with closing(sqlite3.connect(store.data_dir / DATABASE)) as plain:  # a stranger: only what the file itself holds
        if "preference" not in statement:
            plain.execute("PRAGMA foreign_keys=ON")
        with pytest.raises(sqlite3.IntegrityError), plain:
            plain.execute(statement)
    with pytest.raises(Exception, match=r"label|UNIQUE|FOREIGN"), store.session() as session:
        session.execute(text(statement))
    assert labels.effective(store, study.id) == before


def test_readers_cannot_write(store):
    with pytest.raises(Exception, match="readonly"), store.reader() as session:
        session.execute(text("DELETE FROM setting"))


def test_several_first_starts_at_once(tmp_path):
    code = f"import storage; storage.open({str(tmp_path / 'lab')!r}).close()"
    starts = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    for process in starts:
        _, error = process.communicate(timeout=300)  # generous: a busy machine is no failure
        assert process.returncode == 0, error


VOTER = """
import sys, time, storage
from storage import labels
store = storage.open(sys.argv[1])
study, who = labels.list_studies(store)[0], labels.list_annotators(store)[0]
number = 0
while number < 50:
    (pair,) = labels.next_pairs(store, study.id, who.id, 1)
    labels.vote(store, study_id=study.id, pair_id=pair["pair_id"], annotator_id=who.id, choice="first",
                left=pair["left"], milliseconds=1, client_key=f"{sys.argv[2]}-{number}")
    print(pair["pair_id"], flush=True)  # the page may say "saved" only now
    number += 1
time.sleep(600)  # there are pairs left, however late it is killed
"""


def test_kill_9_between_the_vote_and_the_next_page_loses_nothing(tmp_path):
    opened = storage.open(tmp_path / "lab")
    study = labels.create_study(opened, "S")
    labels.annotator(opened, "anna")
    add_rows(opened, study, 120)
    opened.close()
    everything: set[int] = set()
    for name in ("one", "two"):  # killed twice, the second time on what the first left behind
        command = [sys.executable, "-c", VOTER, str(tmp_path / "lab"), name]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as voter:
            saved = [int(voter.stdout.readline()) for _ in range(20)]
            os.kill(voter.pid, signal.SIGKILL)
            saved += [int(line) for line in voter.stdout.read().split()]
        opened = storage.open(tmp_path / "lab")
        rows = labels.effective(opened, study.id)
        with opened.reader() as session:
            assert session.execute(text("PRAGMA integrity_check")).scalar() == "ok"
        opened.close()
        everything |= set(saved)
        assert everything <= {row["pair_id"] for row in rows}
        assert len(rows) <= len(everything) + 2  # at most one vote per kill was saved but not yet answered


def test_opening_is_quick(tmp_path):
    storage.open(tmp_path / "lab").close()
    begun = time.process_time()  # not the clock: a busy machine is no failure
    storage.open(tmp_path / "lab").close()
    assert time.process_time() - begun < 0.5
