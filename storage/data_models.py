"""The tables behind data that came in from outside: imports with their rows, score gaps, and filters built on them.

None of them changes a label: a filter is a named list of labels that do not train while it is on.
"""

import time

from sqlalchemy import Index, text
from sqlmodel import Field, SQLModel

from .models import _json

GAP_COLUMNS = ("aesthetic", "clip", "vqa", "pick")


class Import(SQLModel, table=True):
    """One reading of a file. `source` names its content, `state` is the report so far, committed together with the
    rows that it counts; so a killed import goes on at the very row where it was."""

    __table_args__ = (Index("ix_import_source", "study_id", "source"),)
    id: int | None = Field(default=None, primary_key=True)
    study_id: int = Field(foreign_key="study.id")
    source: str
    name: str
    kind: str
    state: dict = Field(default_factory=dict, sa_column=_json())
    created_at: float = Field(default_factory=time.time)
    finished_at: float | None = None


class ImportRow(SQLModel, table=True):
    """What became of one row (from 1) of an import: its label if it brought exactly one, the reason if it was
    rejected. Rows that brought neither have no entry."""

    __tablename__ = "import_row"
    import_id: int = Field(foreign_key="import.id", primary_key=True)
    row: int = Field(primary_key=True)
    preference_id: int | None = Field(default=None, foreign_key="preference.id")
    reason: str | None = None


class GapSet(SQLModel, table=True):
    """Score gaps of imported labels from one source: a CSV joined to an import by row, or local scorers. Usable when
    `finished_at` is set."""

    __tablename__ = "gap_set"
    id: int | None = Field(default=None, primary_key=True)
    study_id: int = Field(foreign_key="study.id", index=True)
    import_id: int | None = Field(default=None, foreign_key="import.id", index=True)
    name: str
    config: dict = Field(default_factory=dict, sa_column=_json())
    created_at: float = Field(default_factory=time.time)
    finished_at: float | None = None


class Gap(SQLModel, table=True):
    """The gaps of one label: score of the chosen picture minus score of the other; of a tie first minus second."""

    gap_set_id: int = Field(foreign_key="gap_set.id", primary_key=True, ondelete="CASCADE")
    preference_id: int = Field(foreign_key="preference.id", primary_key=True)
    tie: bool
    aesthetic: float | None = None
    clip: float | None = None
    vqa: float | None = None
    pick: float | None = None


class LabelFilter(SQLModel, table=True):
    """A rule that was applied to a study. At most one is on; a removed one stays as a record of what trained when."""

    __tablename__ = "label_filter"
    __table_args__ = (Index("uq_label_filter_on", "study_id", unique=True, sqlite_where=text("removed_at IS NULL")),)
    id: int | None = Field(default=None, primary_key=True)
    study_id: int = Field(foreign_key="study.id", index=True)
    gap_set_id: int = Field(foreign_key="gap_set.id", index=True)
    name: str
    rule: dict = Field(default_factory=dict, sa_column=_json())
    kept: int
    dropped: int
    created_at: float = Field(default_factory=time.time)
    removed_at: float | None = None


class FilterDrop(SQLModel, table=True):
    """A label that a filter keeps out of the training."""

    __tablename__ = "filter_drop"
    filter_id: int = Field(foreign_key="label_filter.id", primary_key=True)
    preference_id: int = Field(foreign_key="preference.id", primary_key=True)
