"""A job may start from a published version or from a checkpoint, which stay while it may need them."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

_STARTS = (("start_version_id", "model_versions"), ("start_checkpoint_id", "checkpoints"))


def upgrade() -> None:
    op.add_column("jobs", sa.Column("rerun_of_id", sa.Uuid(), nullable=True))
    op.create_foreign_key("fk_jobs_rerun_of_id_jobs", "jobs", "jobs", ["rerun_of_id"], ["id"])
    for column, table in _STARTS:
        op.add_column("jobs", sa.Column(column, sa.Uuid(), nullable=True))
        op.create_foreign_key(f"fk_jobs_{column}_{table}", "jobs", table, [column], ["id"])
        op.create_index(
            f"ix_jobs_{column}",
            "jobs",
            [column],
            postgresql_where=sa.text(f"{column} IS NOT NULL AND finished_at IS NULL"),
        )


def downgrade() -> None:
    for column, table in _STARTS:
        op.drop_index(f"ix_jobs_{column}", table_name="jobs")
        op.drop_constraint(f"fk_jobs_{column}_{table}", "jobs", type_="foreignkey")
        op.drop_column("jobs", column)
    op.drop_constraint("fk_jobs_rerun_of_id_jobs", "jobs", type_="foreignkey")
    op.drop_column("jobs", "rerun_of_id")
