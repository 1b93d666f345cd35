"""Opening the database: pragmas, migrations with a backup before them, and the two kinds of transaction.

Durability over speed: WAL with synchronous=FULL, so that a vote that was answered survives `kill -9` and a power cut.
Writers take the write lock when they begin (BEGIN IMMEDIATE): two writers queue up and never deadlock half-way.
"""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import OperationalError
from sqlmodel import Session

MIGRATIONS = Path(__file__).parent / "migrations"
DATABASE = "lab.sqlite"
BUSY_SECONDS = 30


class StorageError(ValueError):
    """Anything a person did or has that storage cannot accept; the text is one sentence for the page."""


class Unwritable(StorageError):
    """The database could not be written now, most often because the disk is full; the same may work later."""


class Storage:
    """An open data folder: `engine`, `media`, and the folders that others write to."""

    def __init__(self, data_dir: Path, engine: Engine):
        from .media import Media  # media raises StorageError, which lives here

        self.data_dir = data_dir
        self.engine = engine
        self._reading = _engine(data_dir / DATABASE, begin="BEGIN", pragmas=("query_only=ON",))
        self.media = Media(data_dir / "media")
        self.runs_dir = data_dir / "runs"
        self.traces_dir = data_dir / "traces"
        self.cache_dir = data_dir / "cache"
        for folder in (self.media.root, self.runs_dir, self.traces_dir, self.cache_dir):
            folder.mkdir(parents=True, exist_ok=True)
        # (study, annotator) -> labels.QueueMark; sound to remember because preference rows are only ever added
        self.queue_marks: dict = {}

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A write transaction, committed on leaving. Keep it short: one writer at a time in all processes. Raises
        Unwritable where the disk is full or the folder gone."""
        with _sentence(self.data_dir), Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def reader(self) -> Iterator[Session]:
        """A read transaction on a stable snapshot; never waits for writers, and refuses to write."""
        with Session(self._reading, expire_on_commit=False) as session:
            yield session

    def close(self) -> None:
        self.engine.dispose()
        self._reading.dispose()


def open_storage(data_dir: str | Path) -> Storage:
    """Open (or create) the data folder, bringing its database to the newest revision.

    Raises StorageError for a folder that cannot be written, a full disk, a file that is no database, or a newer one.
    """
    folder = Path(data_dir).expanduser().resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DATABASE).touch()
    except OSError as error:
        reason = f"Cannot use {folder} as the data folder ({error.strerror}); choose another --data-dir."
        raise StorageError(reason) from error
    if (folder / DATABASE).is_dir():
        raise StorageError(f"{folder / DATABASE} is a folder, but the database is a file; move it away.")
    engine = _engine(folder / DATABASE)
    try:
        with _sentence(folder):
            _migrate(engine, folder)
            return Storage(folder, engine)
    except BaseException:
        engine.dispose()
        raise


@contextmanager
def _sentence(folder: Path) -> Iterator[None]:
    """What the disk refuses becomes one sentence."""
    try:
        yield
    except (OperationalError, sqlite3.OperationalError) as error:
        reason = error.orig if isinstance(error, OperationalError) else error
        raise Unwritable(f"Cannot write the database in {folder} ({reason}); make room on that disk.") from error


def _engine(path: Path, begin: str = "BEGIN IMMEDIATE", pragmas: tuple[str, ...] = ()) -> Engine:
    engine = create_engine(
        URL.create("sqlite", database=str(path)),  # not f"sqlite:///...": a path may hold ? or #
        connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False, "isolation_level": None},
        pool_size=16,
        max_overflow=64,
    )
    # recursive_triggers: REPLACE, too, then fires the triggers that protect labels
    always = (f"busy_timeout={BUSY_SECONDS * 1000}", "synchronous=FULL", "foreign_keys=ON", "recursive_triggers=ON")

    @event.listens_for(engine, "connect")
    def _pragmas(connection, _record) -> None:
        for pragma in (*always, *pragmas):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # the driver's own implicit BEGIN is off (isolation_level None): this is the only place that begins
        connection.exec_driver_sql(begin)

    return engine


def _use_wal(path: Path) -> None:
    """Switch the file to WAL once; the switch ignores busy_timeout, so several first starts must take turns."""
    deadline = time.monotonic() + BUSY_SECONDS
    with closing(sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)) as connection:
        while connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            try:
                connection.execute("PRAGMA journal_mode=WAL")
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)


def scripts() -> ScriptDirectory:
    """The revisions that this version knows, oldest first through `walk_revisions()` reversed."""
    return ScriptDirectory(str(MIGRATIONS))


def migrate(connection: Connection, target: str = "head") -> None:
    """Run the missing revisions inside the connection's transaction."""
    directory = scripts()

    def steps(revision, _context):
        return directory._upgrade_revs(target, revision)

    context = MigrationContext.configure(connection, opts={"fn": steps, "script": directory})
    with Operations.context(context):
        context.run_migrations()


def _migrate(engine: Engine, folder: Path) -> None:
    path = folder / DATABASE
    try:
        _use_wal(path)
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        raise StorageError(f"{path} is not a database ({error}); restore a file from {folder / 'backups'}.") from error
    directory = scripts()
    head = directory.get_current_head()
    with engine.connect() as connection, connection.begin():
        current = MigrationContext.configure(connection).get_current_revision()
        if current == head:
            return
        known = {script.revision for script in directory.walk_revisions()}
        if current is not None and current not in known:
            raise StorageError(
                f"{path} was written by a newer version (revision {current}, this one knows up to {head}); "
                "update Preference Lab, or choose another --data-dir."
            )
        if current is not None:
            backup(path, folder / "backups" / f"{time.strftime('%Y%m%d-%H%M%S')}-{current}.sqlite")
        migrate(connection)


def backup(path: Path, target: Path) -> Path:
    """A consistent copy of the committed database, also while others use it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(target)) as copy:
        source.backup(copy)
    return target


def only(query, *wanted: tuple):
    """The query with a condition `column == value` for each (column, value) given, values of None left out."""
    for column, value in wanted:
        if value is not None:
            query = query.where(column == value)
    return query
