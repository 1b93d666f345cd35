"""The tables. Read together with migrations/, which is what actually builds them (a test compares the two).

Times are seconds since 1970 (UTC) as floats: they sort, subtract and travel as JSON.
A `Preference` row never changes; triggers refuse UPDATE and DELETE on its table. An undo is a row without a choice
that names what it revokes.
"""

import secrets
import time
import uuid

from sqlalchemy import JSON, CheckConstraint, Column, ForeignKey, Index, Integer, UniqueConstraint, text
from sqlmodel import Field, SQLModel

CHOICES = ("first", "second", "tie", "both_bad", "skip")
SIDES = ("first", "second")
ANNOTATOR_KINDS = ("human", "simulated")
SPLITS = ("train", "heldout")
LANES = ("interactive", "training", "data")
JOB_STATES = ("queued", "running", "stopping", "stopped", "done", "failed", "cancelled")
ENDED = ("stopped", "done", "failed", "cancelled")
CHECKPOINT_KINDS = ("base", "adapter", "lrm")
COMPARISON_STATES = ("preparing", "voting", "complete", "abandoned")


def _one_of(column: str, values: tuple[str, ...], optional: bool = False) -> CheckConstraint:
    inside = ", ".join(f"'{value}'" for value in values)
    rule = f"{column} IN ({inside})"
    return CheckConstraint(f"{column} IS NULL OR {rule}" if optional else rule, name=f"ck_{column}")


def _json(nullable: bool = False) -> Column:
    # none_as_null: a missing value is SQL NULL, never the text 'null'
    return Column(JSON(none_as_null=True), nullable=nullable)


def _parent(target: str, delete: str = "SET NULL") -> Column:
    return Column(Integer, ForeignKey(target, ondelete=delete), nullable=True, index=True)


class Annotator(SQLModel, table=True):
    """Who answers. `simulated` annotators are programs; their labels carry that mark for ever."""

    __table_args__ = (_one_of("kind", ANNOTATOR_KINDS),)
    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(unique=True)
    kind: str = "human"
    created_at: float = Field(default_factory=time.time)


class Prompt(SQLModel, table=True):
    """A caption, kept letter by letter; `key` is the normalised text that decides the split."""

    id: int | None = Field(default=None, primary_key=True)
    text: str = Field(unique=True)
    key: str = Field(index=True)


class Study(SQLModel, table=True):
    """A base model, prompts, and the question that is asked of the annotator."""

    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(unique=True)
    base: str
    question: str
    salt: str
    settings: dict = Field(default_factory=dict, sa_column=_json())
    created_at: float = Field(default_factory=time.time)


class StudyPrompt(SQLModel, table=True):
    __tablename__ = "study_prompt"
    __table_args__ = (_one_of("split", SPLITS),)
    study_id: int = Field(foreign_key="study.id", primary_key=True)
    prompt_id: int = Field(foreign_key="prompt.id", primary_key=True)
    split: str


class Picture(SQLModel, table=True):
    """One picture of one origin. The file is found by `hash`; the same file may have several origins."""

    id: int | None = Field(default=None, primary_key=True)
    hash: str = Field(index=True)
    width: int
    height: int
    prompt_id: int | None = Field(default=None, foreign_key="prompt.id", index=True)
    provenance: dict = Field(default_factory=dict, sa_column=_json())
    created_at: float = Field(default_factory=time.time)


class Pair(SQLModel, table=True):
    """Two pictures for one prompt, independent of any study. `key` names prompt and files in any order: outside
    comparisons the same two pictures make one pair only."""

    __table_args__ = (
        Index("ix_pair_key", "key"),
        Index("uq_pair_key", "key", unique=True, sqlite_where=text("origin != 'comparison'")),
    )
    id: int | None = Field(default=None, primary_key=True)
    prompt_id: int = Field(foreign_key="prompt.id", index=True)
    first_id: int = Field(foreign_key="picture.id", index=True)
    second_id: int = Field(foreign_key="picture.id", index=True)
    origin: str
    key: str
    created_at: float = Field(default_factory=time.time)


class StudyPair(SQLModel, table=True):
    """A pair's place in the label queue of a study; `repeat` pairs come twice to each annotator."""

    __tablename__ = "study_pair"
    __table_args__ = (
        Index("ix_study_pair_queue", "study_id", "position", "pair_id", unique=True),
        Index("ix_study_pair_repeats", "study_id", "position", "pair_id", sqlite_where=text("repeat")),
    )
    study_id: int = Field(foreign_key="study.id", primary_key=True)
    pair_id: int = Field(foreign_key="pair.id", primary_key=True, index=True)
    position: int
    repeat: bool = False


class Preference(SQLModel, table=True):
    """One answer, or one undo (`choice` is NULL then). See labels.py for what it means."""

    __table_args__ = (
        _one_of("choice", CHOICES, optional=True),
        CheckConstraint(f'"left" IS NULL OR "left" IN {SIDES}', name="ck_left"),
        CheckConstraint("choice IS NOT NULL OR revokes IS NOT NULL", name="ck_says_something"),
        Index("ix_preference_answers", "study_id", "annotator_id", "pair_id", "choice"),
        Index("ix_preference_pair", "study_id", "pair_id"),
        Index("ix_preference_undo", "study_id", "annotator_id", "id", sqlite_where=text("revokes IS NOT NULL")),
        Index("ix_preference_time", "study_id", "annotator_id", "created_at"),
    )
    id: int | None = Field(default=None, primary_key=True)
    study_id: int = Field(foreign_key="study.id")
    pair_id: int = Field(foreign_key="pair.id", index=True)
    annotator_id: int = Field(foreign_key="annotator.id", index=True)
    choice: str | None
    left: str | None
    milliseconds: int | None
    created_at: float = Field(default_factory=time.time)
    client_key: str = Field(unique=True)
    revokes: int | None = Field(default=None, foreign_key="preference.id", unique=True)
    simulated: bool = False
    repeat: bool = False
    comparison_id: int | None = Field(default=None, foreign_key="comparison.id", index=True)


class Job(SQLModel, table=True):
    """Something to be computed. `config` is frozen when the button is pressed."""

    __table_args__ = (_one_of("lane", LANES), _one_of("state", JOB_STATES), Index("ix_job_queue", "lane", "state"))
    id: str = Field(default_factory=lambda: uuid.uuid4().hex, primary_key=True)
    kind: str
    lane: str
    state: str = "queued"
    config: dict = Field(default_factory=dict, sa_column=_json())
    study_id: int | None = Field(default=None, sa_column=_parent("study.id"))
    run_dir: str | None = None
    supersedes: str | None = Field(default=None, index=True)
    priority: int = 0
    created_at: float = Field(default_factory=time.time)
    started_at: float | None = None
    finished_at: float | None = None
    heartbeat: float | None = None
    pid: int | None = None
    pid_started: float | None = None
    worker: str | None = None
    progress: float | None = None
    message: str | None = None
    error: str | None = None
    result: dict | None = Field(default=None, sa_column=_json(nullable=True))


class Checkpoint(SQLModel, table=True):
    """A base, an adapter or an LRM that can be chosen by name."""

    __table_args__ = (_one_of("kind", CHECKPOINT_KINDS),)
    id: int | None = Field(default=None, primary_key=True)
    kind: str
    name: str
    path: str = Field(unique=True)
    parent_id: int | None = Field(default=None, sa_column=_parent("checkpoint.id"))
    study_id: int | None = Field(default=None, sa_column=_parent("study.id"))
    job_id: str | None = Field(default=None, foreign_key="job.id", ondelete="SET NULL", index=True)
    step: int | None = None
    meta: dict = Field(default_factory=dict, sa_column=_json())
    created_at: float = Field(default_factory=time.time)
    hidden: bool = False


class Trace(SQLModel, table=True):
    """A stored trajectory. `key` names what would be sampled again: policy, prompt, seed, sampler."""

    id: int | None = Field(default=None, primary_key=True)
    key: str = Field(unique=True)
    path: str
    bytes: int
    prompt: str
    seed: int
    policy: dict = Field(default_factory=dict, sa_column=_json())
    config: dict = Field(default_factory=dict, sa_column=_json())
    study_id: int | None = Field(default=None, sa_column=_parent("study.id"))
    job_id: str | None = Field(default=None, foreign_key="job.id", ondelete="SET NULL", index=True)
    created_at: float = Field(default_factory=time.time)
    used_at: float = Field(default_factory=time.time, index=True)


class TraceScore(SQLModel, table=True):
    """What one LRM says along one trace; `lrm` is its path or alias, so shipped models need no checkpoint row."""

    __tablename__ = "trace_score"
    __table_args__ = (UniqueConstraint("trace_id", "lrm"),)
    id: int | None = Field(default=None, primary_key=True)
    trace_id: int = Field(foreign_key="trace.id", ondelete="CASCADE", index=True)
    lrm: str
    scores: list = Field(default_factory=list, sa_column=_json())
    created_at: float = Field(default_factory=time.time)


class Comparison(SQLModel, table=True):
    """Two policies compared blindly; `plan` fixes prompts, seeds and the number of votes beforehand."""

    __table_args__ = (_one_of("state", COMPARISON_STATES),)
    id: int | None = Field(default=None, primary_key=True)
    study_id: int = Field(foreign_key="study.id", index=True)
    policy_a: dict = Field(default_factory=dict, sa_column=_json())
    policy_b: dict = Field(default_factory=dict, sa_column=_json())
    plan: dict = Field(default_factory=dict, sa_column=_json())
    state: str = "preparing"
    seed: int = Field(default_factory=lambda: secrets.randbits(62))
    result: dict | None = Field(default=None, sa_column=_json(nullable=True))
    created_at: float = Field(default_factory=time.time)
    completed_at: float | None = None


class ComparisonPair(SQLModel, table=True):
    """Which side of a pair policy a made: drawn at random, told to nobody before the verdict."""

    __tablename__ = "comparison_pair"
    __table_args__ = (CheckConstraint(f"a_is IN {SIDES}", name="ck_a_is"),)
    comparison_id: int = Field(foreign_key="comparison.id", primary_key=True)
    pair_id: int = Field(foreign_key="pair.id", primary_key=True, unique=True)
    a_is: str
    seed: int
    position: int


class Setting(SQLModel, table=True):
    key: str = Field(primary_key=True)
    value: dict | list | str | int | float | bool | None = Field(default=None, sa_column=_json(nullable=True))
