"""Repeat pairs are found by their place in the queue, so that asking for the next pair stays quick in large studies."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.execute("DROP INDEX ix_study_pair_repeat")
    op.execute("CREATE INDEX ix_study_pair_repeats ON study_pair (study_id, position, pair_id) WHERE repeat")
