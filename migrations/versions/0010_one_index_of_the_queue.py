"""The queue has one index, by project: beside the other one the claim read the whole queue for each project."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_index("ix_jobs_queued", table_name="jobs")


def downgrade() -> None:
    op.create_index(
        "ix_jobs_queued",
        "jobs",
        [sa.text("priority DESC"), "seq"],
        unique=False,
        postgresql_where=sa.text("state = 'queued'"),
    )
