"""The first schema: raters, their sessions, trials and votes; the audit log."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "meta",
        sa.Column("name", sa.String(32), primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )
    op.create_table(
        "rater",
        sa.Column("id", sa.String(12), primary_key=True),
        sa.Column("slot", sa.Integer),
        sa.Column("link_hash", sa.String(64), unique=True),
        sa.Column("platform_hash", sa.String(64), unique=True),
        sa.Column("consent_version", sa.String(64)),
        sa.Column("consent_at", sa.BigInteger),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("finished_at", sa.BigInteger),
    )
    op.create_table(
        "session",
        sa.Column("token_hash", sa.String(64), primary_key=True),
        sa.Column("rater", sa.String(12), sa.ForeignKey("rater.id"), nullable=False, index=True),
        sa.Column("created_at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "trial",
        sa.Column("rater", sa.String(12), sa.ForeignKey("rater.id"), primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column("token", sa.String(32), nullable=False, unique=True),
        sa.Column("left_token", sa.String(32), nullable=False, unique=True),
        sa.Column("right_token", sa.String(32), nullable=False, unique=True),
        sa.Column("shown_at", sa.BigInteger),
    )
    op.create_table(
        "vote",
        sa.Column("rater", sa.String(12), primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column(
            "choice",
            sa.String(8),
            sa.CheckConstraint("choice IN ('left', 'right', 'tie', 'problem')"),
            nullable=False,
        ),
        sa.Column("response_ms", sa.Integer, sa.CheckConstraint("response_ms >= 0"), nullable=False),
        sa.Column("problem_text", sa.Text),
        sa.Column("submitted_at", sa.BigInteger, nullable=False),
        sa.ForeignKeyConstraint(["rater", "position"], ["trial.rater", "trial.position"]),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("actor", sa.String(16), nullable=False),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
    )


def downgrade() -> None:
    for table in ("audit", "vote", "trial", "session", "rater", "meta"):
        op.drop_table(table)
