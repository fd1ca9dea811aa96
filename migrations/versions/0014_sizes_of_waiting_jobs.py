"""An index of the sizes that wait: an idle worker learns from it that nothing fits, and reads no queue."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(
        "ix_jobs_sizes",
        "jobs",
        ["num_gpus", "queue"],
        postgresql_where=sa.text("state = 'queued' AND num_gpus >= 0"),
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_sizes", table_name="jobs")
